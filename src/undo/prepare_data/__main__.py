from undo import cli
from undo.prepare_data.prepare import STAGE

if __name__ == "__main__":
    cli.main(STAGE)
