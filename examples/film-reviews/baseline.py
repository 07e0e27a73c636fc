"""TF-IDF and logistic regression on the example data: what a score without a language model looks like.

python examples/film-reviews/baseline.py [demo/film-reviews]     # beside the test score of that adapter
"""

import csv
import json
import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline


def read(name: str) -> tuple[list[str], list[str]]:
    with open(Path(__file__).parent / name, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


model = make_pipeline(
    TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
)
model.fit(*read("train.csv"))
beside = ""
if len(sys.argv) > 1:
    result = json.loads(Path(sys.argv[1], "run", "result.json").read_text(encoding="utf-8"))
    beside = f"textlora {result['test']['accuracy']:.4f}, "
print(f"test accuracy: {beside}TF-IDF + logistic regression {model.score(*read('test.csv')):.4f}")
