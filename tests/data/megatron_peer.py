"""Run megatron-core's own writer and reader, in a Python that has it.

PYTHON tests/data/megatron_peer.py fixtures
    write tests/data/fixtures/{short,sentences}.{bin,idx}
PYTHON tests/data/megatron_peer.py copy PREFIX TARGET
    read PREFIX document by document and write it again
PYTHON tests/data/megatron_peer.py read PREFIX
    print the documents as JSON
"""

import json
import sys
import warnings
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
END = 259  # <|endoftext|> of the vocabulary that the tests create


def documents() -> list[list[int]]:
    """Return the documents of the fixtures: 40 of 2 to 118 tokens, bytes of small Latin letters
    with an end."""
    return [
        [64 + (number * place + place) % 26 for place in range(1 + 3 * number)] + [END]
        for number in range(40)
    ]


def main(action: str, *arguments: str) -> None:
    warnings.simplefilter("ignore")
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    def write(prefix, dtype, parts_of_documents):
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
        for parts in parts_of_documents:
            for part in parts:
                builder.add_item(torch.tensor(part))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")

    def read(prefix):
        data = IndexedDataset(prefix)
        ends = data.document_indices
        return data.index.dtype, [
            numpy.concatenate([data[i] for i in range(first, last)]).tolist()
            for first, last in zip(ends[:-1], ends[1:], strict=True)
        ]

    if action == "fixtures":
        FIXTURES.mkdir(exist_ok=True)
        write(
            FIXTURES / "short", DType.optimal_dtype(260), [[document] for document in documents()]
        )
        # Like preprocess_data.py --split-sentences: several sequences in a document.
        write(
            FIXTURES / "sentences",
            DType.optimal_dtype(70_000),
            [
                [document[i : i + 20] for i in range(0, len(document), 20)]
                for document in documents()
            ],
        )
    elif action == "copy":
        dtype, found = read(arguments[0])
        write(arguments[1], dtype, [[document] for document in found])
    else:
        print(json.dumps(read(arguments[0])[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
