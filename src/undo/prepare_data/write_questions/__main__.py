"""`python -m undo.prepare_data.write_questions`: see extraction.py."""

import sys

from undo.prepare_data.write_questions.extraction import main

sys.exit(main(sys.argv[1:]))
