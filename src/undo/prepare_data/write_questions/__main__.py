import sys

from undo import cli

if __name__ == "__main__":
    if sys.argv[1:2] == ["wmdp-qa"]:
        from undo.prepare_data.extraction import main

        sys.exit(main(sys.argv[2:]))

    from undo.prepare_data.prepare import STAGE

    cli.main(STAGE)
