-- Sandboxes that sleep, and their past.

-- What its present state descends from: a row of `snapshots` or of `template_builds`, or neither if
-- that was deleted.
ALTER TABLE sandboxes ADD COLUMN base_id           TEXT    NOT NULL DEFAULT '';
UPDATE sandboxes SET base_id = snapshot_id;
ALTER TABLE sandboxes ADD COLUMN lifetime          INTEGER;                     -- microseconds; NULL: never ends
ALTER TABLE sandboxes ADD COLUMN env_vars          TEXT    NOT NULL DEFAULT '[]'; -- JSON pairs; empty once it is dead
ALTER TABLE sandboxes ADD COLUMN auto_pause        INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN auto_pause_memory INTEGER NOT NULL DEFAULT 1;
ALTER TABLE sandboxes ADD COLUMN auto_resume       INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN pause_snapshot    TEXT;                        -- while pausing, paused or resuming
ALTER TABLE sandboxes ADD COLUMN pause_mode        TEXT;                        -- full | filesystem
ALTER TABLE sandboxes ADD COLUMN pause_at          INTEGER;
ALTER TABLE sandboxes ADD COLUMN rollback_to       TEXT;                        -- while it is being rolled back

-- No foreign keys: a snapshot outlives its sandbox, its template and its parent.
CREATE TABLE snapshots (
    id            TEXT    PRIMARY KEY,
    name          TEXT,                     -- the newest of several with one name is meant by it
    tag           TEXT    NOT NULL,
    build_id      TEXT    NOT NULL,         -- a UUID
    sandbox_id    TEXT    NOT NULL,
    template_id   TEXT    NOT NULL,
    parent_id     TEXT,
    state         TEXT    NOT NULL,         -- publishing | ready | failed | deleting | deleted
    reason        TEXT,                     -- why it failed
    mode          TEXT    NOT NULL,         -- full | filesystem
    created_at    INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL,
    expires_at    INTEGER,                  -- NULL: never
    cpu_count     INTEGER NOT NULL,
    memory_mib    INTEGER NOT NULL,
    disk_mib      INTEGER NOT NULL,
    envd_version  TEXT    NOT NULL,
    tier          TEXT,                     -- this and what follows: NULL until it is published
    bytes_scanned INTEGER,
    bytes_dirty   INTEGER,
    bytes_written INTEGER,
    frozen        INTEGER                   -- microseconds
) STRICT;
CREATE INDEX snapshots_by_age ON snapshots (created_at, id);
CREATE INDEX snapshots_by_sandbox ON snapshots (sandbox_id);
CREATE INDEX snapshots_by_name ON snapshots (name, tag) WHERE name IS NOT NULL;
CREATE INDEX snapshots_by_parent ON snapshots (parent_id) WHERE parent_id IS NOT NULL;
