"""A network traced at its true size: shapes, FLOPs, bytes, receptive field, total stride."""
