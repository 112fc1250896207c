"""Make lines of a file of answers."""

LABELS = ("negative", "positive")


def line(row, label="positive", probability=0.8, reference="", language="en", **columns):
    other = LABELS[label == "negative"]
    choices = [
        {"label": label, "probability": probability},
        {"label": other, "probability": 1 - probability},
    ]
    return {
        "row": row,
        "input": f"text {row}",
        "references": [reference] if reference else [],
        "text": label,
        "language": language,
        "shortened": False,
        "choices": choices,
        "columns": columns,
    }
