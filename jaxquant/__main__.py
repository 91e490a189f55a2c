"""`python -m jaxquant` is the command `jaxquant`."""

import sys

from jaxquant.cli import main

sys.exit(main())
