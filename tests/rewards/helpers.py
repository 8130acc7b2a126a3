"""User rewards that misbehave, for the pool tests, and the reader of case files."""

import json
import os
import sys
import time

from sdjax.records import Verdict


def misbehave(response, gold):
    """Does what the response says."""
    if response == "hang":
        while True:
            time.sleep(0.01)
    if response == "crash":
        os._exit(3)
    if response == "memory":
        return bool(bytearray(4 << 30))
    if response == "raise":
        raise ValueError("as told")
    if response == "print":
        print('{"id": 0, "verdict": {"correct": true}}')
    return response == gold


def modules(response, gold, config):
    """Right when the named module was imported into the worker."""
    return Verdict(response in sys.modules, str(config.deadline_s), "modules")


def load_cases(path):
    """Rows of a case file; `response_parts` are texts and [text, times] pairs."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "response" not in row:
                parts = row["response_parts"]
                row["response"] = "".join(p if isinstance(p, str) else p[0] * p[1] for p in parts)
            yield row
