"""Prepare: text -> tokenizer, packed training and validation rows by role, and validation problems.

    uv run python -m undo.prepare_data demo [key=value ...] [--dry-run] [--force] [--runs DIR]

A prepare run is a run like any other, and the other stages name it as their `data`:

    tokenizer/                   loads with AutoTokenizer
    train/<role>/                token stores
    validation/<role>/           token stores
    problems.jsonl               validation problems, one a line

Questions and answers from a corpus, written by a model, are made before that (`prepare_data.extraction`):

    uv run python -m undo.prepare_data wmdp-qa --help
"""
