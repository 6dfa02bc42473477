"""`python -m hf_unlearn.cli`, which `accelerate launch --module` needs."""

import sys

from hf_unlearn.cli import main


if __name__ == "__main__":
    sys.exit(main())
