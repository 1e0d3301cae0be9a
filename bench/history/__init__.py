"""Benchmarks for asv, which times them at many commits: see asv.conf.json.  They use nothing but pyreg and NumPy."""
