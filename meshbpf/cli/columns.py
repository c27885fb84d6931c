"""The columns of every list, in order, with what becomes of each when the screen is narrow (see `layout`)."""

from __future__ import annotations

from meshbpf.cli import layout
from meshbpf.cli.layout import Column

SERVICES = (
    Column("service", "SERVICE"),
    Column("address", "ADDRESS", wrap=15),
    Column("port", "PORT"),
    Column("carrier", "CARRIER"),
    Column("why", "WHY", moods=True, drop=1),
    Column("endpoints", "READY"),
    Column("open", "OPEN", drop=2),
    Column("connections", "CONNECTIONS", wide=True),
    Column("source", "SOURCE", wide=True, wrap=16),
)
ENDPOINTS = (
    Column("service", "SERVICE"),
    Column("endpoint", "ENDPOINT"),
    Column("port", "PORT", drop=4),
    Column("state", "STATE", moods=True),
    Column("weight", "WEIGHT", drop=5),
    Column("ok", "OK", drop=3),
    Column("failed", "FAILED"),
    Column("last_error", "LAST-ERROR", drop=1),
    Column("last_error_seconds", "AGO", drop=2, form=layout.age),
    Column("zone", "ZONE", wide=True),
    Column("source", "SOURCE", wide=True, wrap=16),
)
CONNECTIONS = (
    Column("service", "SERVICE"),
    Column("port", "PORT"),
    Column("carrier", "CARRIER"),
    Column("open", "OPEN"),
    Column("opened", "OPENED", wide=True),
)
CLIENTS = (
    Column("service", "SERVICE"),
    Column("carrier", "CARRIER", drop=1),
    Column("client", "CLIENT"),
    Column("workload", "WORKLOAD", wrap=20),
    Column("pid", "PID"),
    Column("endpoint", "ENDPOINT", drop=2),
    Column("asked", "ASKED", wide=True),
    Column("cgroup", "CGROUP", wide=True, wrap=24),
    Column("netns", "NETNS", wide=True),
)
EDGES = (
    Column("workload", "WORKLOAD", wrap=20),
    Column("service", "SERVICE"),
    Column("carrier", "CARRIER"),
    Column("open", "OPEN"),
    Column("connections", "CONNECTIONS", drop=2),
    Column("requests", "REQUESTS"),
    Column("success_percent", "SUCCESS", drop=1, form=layout.percent),
    Column("failed", "FAILED", wide=True),
)
REASONS = (
    Column("program", "PROGRAM", drop=1),
    Column("reason", "REASON"),
    Column("count", "COUNT"),
    Column("text", "MEANS", wrap=24),
    Column("remedy", "REMEDY", wrap=16),
    Column("services", "SERVICES", wide=True, wrap=16),
)
MAPS = (
    Column("name", "NAME"),
    Column("entries", "ENTRIES"),
    Column("capacity", "SIZE"),
    Column("full_percent", "FULL", form=layout.percent),
    Column("writer", "WRITER", wrap=8),
    Column("key", "KEY", wrap=12),
    Column("value", "VALUE", wrap=16),
    Column("reader", "READER", wide=True, wrap=8),
    Column("kind", "KIND", wide=True),
    Column("memory_bytes", "BYTES", wide=True),
)
FILLS = (
    Column("map", "MAP"),
    Column("entries", "ENTRIES"),
    Column("capacity", "SIZE"),
    Column("full_percent", "FULL", form=layout.percent),
)
CHANGES = (
    Column("change", "CHANGE", moods=True),
    Column("kind", "KIND"),
    Column("name", "NAME"),
    Column("says", "WHAT", wrap=24),
    Column("affects", "AFFECTS", wrap=7),
)
WRITES = (
    Column("map", "MAP"),
    Column("set", "SET"),
    Column("deleted", "DELETED"),
)
