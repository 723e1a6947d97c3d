-- Times are microseconds since 1970-01-01 UTC.

CREATE TABLE api_keys (
    id         TEXT    PRIMARY KEY,
    name       TEXT    NOT NULL,
    hash       BLOB    NOT NULL UNIQUE,     -- sha256 of the whole key; the key itself is nowhere
    hint       TEXT    NOT NULL,            -- its first characters, for a person to tell keys apart
    created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE templates (
    id              TEXT    PRIMARY KEY,
    public          INTEGER NOT NULL DEFAULT 0,
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    spawn_count     INTEGER NOT NULL DEFAULT 0,
    last_spawned_at INTEGER
) STRICT;

CREATE TABLE template_aliases (
    alias       TEXT PRIMARY KEY,
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE
) STRICT;
CREATE INDEX template_aliases_by_template ON template_aliases (template_id);

CREATE TABLE template_builds (
    id           TEXT    PRIMARY KEY,       -- a UUID
    template_id  TEXT    NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    recipe       TEXT    NOT NULL,          -- what its root file system is made by
    status       TEXT    NOT NULL,          -- waiting | building | ready | error
    reason       TEXT,                      -- why it failed
    snapshot_id  TEXT    UNIQUE,            -- what sandboxes of it are restored from, once ready
    cpu_count    INTEGER NOT NULL,
    memory_mib   INTEGER NOT NULL,
    disk_mib     INTEGER NOT NULL,
    envd_version TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL,
    finished_at  INTEGER
) STRICT;
CREATE INDEX template_builds_by_template ON template_builds (template_id, created_at);

CREATE TABLE template_tags (
    template_id TEXT    NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag         TEXT    NOT NULL,
    build_id    TEXT    NOT NULL REFERENCES template_builds (id) ON DELETE CASCADE,
    assigned_at INTEGER NOT NULL,
    PRIMARY KEY (template_id, tag)
) STRICT, WITHOUT ROWID;

CREATE TABLE template_build_log (
    build_id TEXT    NOT NULL REFERENCES template_builds (id) ON DELETE CASCADE,
    seq      INTEGER NOT NULL,
    at       INTEGER NOT NULL,
    level    TEXT    NOT NULL,
    step     TEXT,
    message  TEXT    NOT NULL,
    PRIMARY KEY (build_id, seq)
) STRICT, WITHOUT ROWID;

-- No foreign keys to templates: a sandbox outlives the template that it was made from.
CREATE TABLE sandboxes (
    id             TEXT    PRIMARY KEY,
    template_id    TEXT    NOT NULL,
    build_id       TEXT    NOT NULL,
    snapshot_id    TEXT    NOT NULL,
    alias          TEXT,
    state          TEXT    NOT NULL,        -- the words of lifecycle::State
    metadata       TEXT    NOT NULL,        -- JSON object of strings
    network        TEXT    NOT NULL,        -- JSON of NetworkOptions
    envd_token     TEXT    NOT NULL,        -- what a client that connects again is given
    traffic_token  TEXT,
    envd_version   TEXT    NOT NULL,
    cpu_count      INTEGER NOT NULL,
    memory_mib     INTEGER NOT NULL,
    disk_mib       INTEGER NOT NULL,
    generation     INTEGER NOT NULL DEFAULT 0,
    started_at     INTEGER NOT NULL,
    end_at         INTEGER,                 -- NULL: never
    ended_at       INTEGER,
    end_reason     TEXT
) STRICT;
CREATE INDEX sandboxes_alive ON sandboxes (state) WHERE state <> 'dead';
CREATE INDEX sandboxes_ended ON sandboxes (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE sandbox_log (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    sandbox_id TEXT    NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    at         INTEGER NOT NULL,
    level      TEXT    NOT NULL,
    message    TEXT    NOT NULL,
    fields     TEXT    NOT NULL             -- JSON object of strings
) STRICT;
CREATE INDEX sandbox_log_by_sandbox ON sandbox_log (sandbox_id, at);

CREATE TABLE idempotency_keys (
    key        TEXT    PRIMARY KEY,
    body_hash  BLOB    NOT NULL,
    sandbox_id TEXT    NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX idempotency_keys_by_sandbox ON idempotency_keys (sandbox_id);
