"""The demo's load: `python -m meshbpf.demo.caller URL COUNT [keep]`, calls one after another with the standard library.

Prints {"codes": {code: count}, "from": {name: count}, "ms": [...]} as JSON. `keep`: all calls on one connection.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

SECONDS = 5.0


def run(url: str, count: int, keep: bool) -> dict[str, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=SECONDS)
    codes: Counter[str] = Counter()
    names: Counter[str] = Counter()
    took: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        try:
            connection.request("GET", parts.path or "/")
            response = connection.getresponse()
            body = response.read()
        except OSError as error:
            codes[type(error).__name__] += 1
            connection.close()
            continue
        took.append(round(1000 * (time.perf_counter() - began), 3))
        codes[str(response.status)] += 1
        if response.status == 200:
            names[json.loads(body)["from"]] += 1
        if not keep:
            connection.close()
    connection.close()
    return {"codes": codes, "from": names, "ms": took}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), "keep" in sys.argv[3:])))
