"""The papers' experiments at equal time, against honest controls: `adaselect experiment NAME` and `... report`."""
