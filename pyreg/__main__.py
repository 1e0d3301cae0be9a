"""`python -m pyreg`: what was built, and what it runs on, for reports of bugs."""

import os
import sys

from pyreg import show_config

try:
    show_config()
    sys.stdout.flush()
except BrokenPipeError:  # who read it has enough, as in `python -m pyreg | head -n 1`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
