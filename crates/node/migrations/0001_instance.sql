-- One row per instance: one VM that a sandbox has, or is about to have, on this machine. A sandbox
-- normally has one; while it changes over from one VM to another it has two, told apart by their
-- generation.
--
-- A row is written before anything of the instance exists and deleted after the last of it is gone,
-- so that after a crash this table names everything that may have to be adopted or removed.
CREATE TABLE instance (
    sandbox     TEXT    NOT NULL,
    generation  INTEGER NOT NULL CHECK (generation > 0),
    snapshot    TEXT    NOT NULL,
    step        TEXT    NOT NULL CHECK (step IN ('creating', 'running', 'removing')),
    -- Size of the VM.
    cpus        INTEGER NOT NULL CHECK (cpus > 0),
    memory_mib  INTEGER NOT NULL CHECK (memory_mib > 0),
    disk_mib    INTEGER NOT NULL,
    -- Index of the network slot; NULL until one was taken.
    slot        INTEGER,
    -- What the hypervisor driver needs to find the VM again, as JSON; NULL until it was started.
    vm          TEXT,
    -- What the guest is told at the start of each life of the channel, as JSON. Holds secrets.
    identity    TEXT    NOT NULL,
    -- Unix time in milliseconds.
    created_at  INTEGER NOT NULL,
    running_at  INTEGER,
    PRIMARY KEY (sandbox, generation)
) STRICT, WITHOUT ROWID;

-- Template builds under way. The snapshot that one publishes is nobody's until the build has ended
-- well, which is when its row is deleted; after a crash it is deleted with the row.
CREATE TABLE build (
    snapshot    TEXT    NOT NULL PRIMARY KEY,
    -- Unix time in milliseconds.
    started_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
