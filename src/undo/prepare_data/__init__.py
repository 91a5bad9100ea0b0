"""The stage `prepare`: text becomes a tokenizer, packed training and validation rows by role, and validation problems.

A prepare run is a run like any other, and the other stages name it as their `data`:

    tokenizer/                   loads with AutoTokenizer
    train/<role>/                token stores
    validation/<role>/           token stores
    problems.jsonl               validation problems, one a line
    run.json                     the tokens that enclose a document, `bos` and `eos`, beside what all runs record

Questions and answers from a corpus, written by a model, are made before that (`write_questions/`).
"""
