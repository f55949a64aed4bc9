"""`python -m peft_taskmoe.cli`, the same as `python -m peft_taskmoe`."""

import sys

from .main import main

sys.exit(main())
