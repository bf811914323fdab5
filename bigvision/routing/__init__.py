"""Spatial, temporal and instance-wise routing: the gate applied to regions of a raster."""
