"""`python -m pyreg`: what was built, and what it runs on."""

from pyreg import show_config

show_config()
