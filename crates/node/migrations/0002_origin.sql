-- The manifest of the snapshot that the instance was restored from or was last captured as, as
-- JSON: what its next snapshot descends from. Kept here because that snapshot may be deleted any
-- time. NULL for a VM that was booted.
ALTER TABLE instance ADD COLUMN origin TEXT;

-- The sandbox whose VM this is and which of its VMs. NULL for a spare, which is nobody's yet. The
-- columns `sandbox` and `generation` name the instance itself: its directories, volumes and groups.
ALTER TABLE instance ADD COLUMN serves TEXT;
ALTER TABLE instance ADD COLUMN serves_generation INTEGER;
UPDATE instance SET serves = sandbox, serves_generation = generation;
