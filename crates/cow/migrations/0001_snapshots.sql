CREATE TABLE snapshots (
    id         TEXT PRIMARY KEY,
    kind       TEXT NOT NULL,
    parent     TEXT,
    created_at TEXT NOT NULL,
    -- The manifest as published, so that a failed snapshot can still be described.
    manifest   TEXT NOT NULL,
    -- Identifies the run of the kernel during which it was published: what is not durable
    -- survives this program, but not that kernel.
    boot_id    TEXT NOT NULL,
    durable    INTEGER NOT NULL DEFAULT 0,
    -- Why it must not be restored; NULL while it can be.
    failure    TEXT
) STRICT;

CREATE TABLE parts (
    snapshot TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    size     INTEGER NOT NULL,
    -- NULL until the snapshot is durable.
    checksum TEXT,
    PRIMARY KEY (snapshot, name)
) STRICT;
