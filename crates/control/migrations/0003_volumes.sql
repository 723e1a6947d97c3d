-- Directories that outlive sandboxes, and what sandboxes have mounted.

CREATE TABLE volumes (
    id         TEXT    PRIMARY KEY,         -- also the name of its directory
    name       TEXT    NOT NULL UNIQUE,
    token      TEXT    NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;

-- JSON list of volume::Mount, in the order in which they were asked for; never changes.
ALTER TABLE sandboxes ADD COLUMN mounts TEXT NOT NULL DEFAULT '[]';

-- What the sandbox had that the snapshot was taken of: sandboxes that are made from it have it, too.
-- Filled by the trigger, because the row of the sandbox may be gone when that is wanted.
ALTER TABLE snapshots ADD COLUMN mounts TEXT NOT NULL DEFAULT '[]';
CREATE TRIGGER snapshots_keep_mounts AFTER INSERT ON snapshots BEGIN
    UPDATE snapshots
    SET mounts = coalesce((SELECT mounts FROM sandboxes WHERE id = NEW.sandbox_id), '[]')
    WHERE id = NEW.id;
END;
