"""`python -m peft_taskmoe` is the command line."""

import sys

from peft_taskmoe.cli import main

sys.exit(main())
