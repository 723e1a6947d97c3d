-- Counting what is kept, and finding what is left of deleted snapshots, must not read all of them.
CREATE INDEX snapshots_by_state ON snapshots (state);
