-- Templates that are made in steps, of images, and of other templates.

ALTER TABLE template_builds ADD COLUMN spec        TEXT;                        -- JSON of BuildSpec; NULL: not said yet
ALTER TABLE template_builds ADD COLUMN defaults    TEXT NOT NULL DEFAULT '{}';  -- JSON of Defaults, known once it is ready
ALTER TABLE template_builds ADD COLUMN launches    TEXT NOT NULL DEFAULT '[]';  -- JSON; what runs in each of them
ALTER TABLE template_builds ADD COLUMN tags        TEXT NOT NULL DEFAULT '[]';  -- JSON; what it is called once it is ready
ALTER TABLE template_builds ADD COLUMN failed_step TEXT;                        -- base | number from 1 | finalize
ALTER TABLE template_builds ADD COLUMN fingerprint TEXT;                        -- of all that it is made of
UPDATE template_builds SET spec = json_object('origin', json_object('recipe', recipe));

-- Several builds may be restored from one: the column of old was unique.
ALTER TABLE template_builds ADD COLUMN made_id TEXT;
UPDATE template_builds SET made_id = snapshot_id, fingerprint = 'build:' || id WHERE snapshot_id IS NOT NULL;
UPDATE template_builds SET snapshot_id = NULL;
CREATE INDEX template_builds_by_snapshot ON template_builds (made_id) WHERE made_id IS NOT NULL;

-- What an origin and some steps lead to. A row exists before its snapshot does.
CREATE TABLE template_layers (
    snapshot_id TEXT    PRIMARY KEY,
    fingerprint TEXT    NOT NULL,           -- of the origin, the kernel, the guest daemon and the steps
    ready       INTEGER NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX template_layers_by_fingerprint ON template_layers (fingerprint);

-- Which layers a build is made of; a layer that no build is made of goes.
CREATE TABLE template_build_layers (
    build_id    TEXT NOT NULL REFERENCES template_builds (id) ON DELETE CASCADE,
    snapshot_id TEXT NOT NULL REFERENCES template_layers (snapshot_id) ON DELETE CASCADE,
    PRIMARY KEY (build_id, snapshot_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX template_build_layers_by_layer ON template_build_layers (snapshot_id);
INSERT INTO template_layers SELECT made_id, fingerprint, 1, created_at FROM template_builds WHERE made_id IS NOT NULL;
INSERT INTO template_build_layers SELECT id, made_id FROM template_builds WHERE made_id IS NOT NULL;

-- Requests that must not be carried out twice.
CREATE TABLE template_requests (
    id         TEXT    PRIMARY KEY,         -- chosen by the client
    body_hash  BLOB    NOT NULL,
    build_id   TEXT    NOT NULL REFERENCES template_builds (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX template_requests_by_build ON template_requests (build_id);

-- What a template gives its sandboxes, and theirs theirs: JSON of Defaults.
ALTER TABLE sandboxes ADD COLUMN defaults TEXT NOT NULL DEFAULT '{}';
ALTER TABLE snapshots ADD COLUMN defaults TEXT NOT NULL DEFAULT '{}';
CREATE TRIGGER snapshots_keep_defaults AFTER INSERT ON snapshots BEGIN
    UPDATE snapshots
    SET defaults = coalesce((SELECT defaults FROM sandboxes WHERE id = NEW.sandbox_id), '{}')
    WHERE id = NEW.id;
END;
