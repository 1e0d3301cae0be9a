"""Benchmarks for asv, which times them at many commits: see asv.conf.json.  They need only pyreg and NumPy."""
