"""`python -m splitlab.report` renders the report."""

import sys

from splitlab.report.page import main

sys.exit(main())
