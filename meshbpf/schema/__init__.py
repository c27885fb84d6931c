"""Configuration text to model values, or all of its faults as `file:line:column: message`. The contract is INTERFACE's
"Configuration".

Rules: nothing is ignored (unknown and not-yet-enforced fields are refused), `parse` is pure, and every default comes
from the model. One module per kind, `checks` compares documents, `later` lists what is refused, `files` reads paths.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field

from meshbpf import garbage, yamlpos
from meshbpf.model import Agent, Service, ServicePolicy
from meshbpf.schema import agent, checks, jsontext, later, ordinary, pieces, policy, service
from meshbpf.schema.fields import Fields
from meshbpf.schema.report import ConfigErrors, Report
from meshbpf.schema.service import API_VERSION
from meshbpf.schema.words import meant, shown

__all__ = ["API_VERSION", "ConfigErrors", "Known", "Parsed", "parse"]

_KINDS = ("Agent", "Service", "ServicePolicy")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the files say: services by (namespace, name), addresses only where they name some; no Agent is None."""

    agent: Agent | None = None
    services: tuple[Service, ...] = ()
    policies: tuple[ServicePolicy, ...] = ()


@dataclass(slots=True)
class _Found:
    agents: list[agent.AgentDocument] = field(default_factory=list)
    services: list[service.ServiceDocument] = field(default_factory=list)
    policies: list[policy.PolicyDocument] = field(default_factory=list)
    complete: bool = True  # no service can have gone unseen
    repeated: int = 0  # values that aliases stand for


# What pieces (file, first line, text) said that hold ordinary services and nothing else.
Known = MutableMapping[tuple[str, int, str], Sequence[service.ServiceDocument]]


def parse(texts: Sequence[tuple[str, str]], known: Known | None = None) -> Parsed:
    """All documents of all (file, text) pairs. Raises `ConfigErrors` with every fault, in the order of the files.

    What is in order is read quickly, without knowing where everything stands; after a fault all is read carefully.
    `known`, empty at first, remembers for the next time: what is still there as it was gives the same objects.
    """
    with garbage.paused():
        try:
            return _parse(texts, quick=True, known={} if known is None else known)
        except ConfigErrors:
            return _parse(texts, quick=False)


def _parse(texts: Sequence[tuple[str, str]], *, quick: bool, known: Known | None = None) -> Parsed:
    report = Report([file for file, _ in texts])
    found = _Found()
    read: Known = {}
    for file, text in texts:
        if not quick:
            _content(yamlpos.read(file, text), report, found)
            continue
        for piece in pieces.cut(text):
            key = (file, piece.first_line, piece.text)
            if services := (known or {}).get(key) or _piece(file, piece, report, found):
                read[key] = services
                found.services += services
    checks.check(found.agents, found.services, found.policies, report, complete=found.complete)
    report.raise_any()
    if known is not None:
        known.clear()
        known.update(read)
    return Parsed(
        agent=found.agents[0].agent if found.agents else None,
        services=tuple(
            sorted((item.service for item in found.services), key=lambda item: (item.namespace, item.name)),
        ),
        policies=tuple(
            sorted((item.policy for item in found.policies), key=lambda item: (item.namespace, item.service)),
        ),
    )


def _piece(file: str, piece: pieces.Piece, report: Report, found: _Found) -> Sequence[service.ServiceDocument]:
    """The services of a piece that holds nothing else; any other piece is put into `found`."""
    if value := jsontext.read(piece.text):
        read = ordinary.read(value.value, yamlpos.Mark(file, piece.first_line + value.line - 1, value.column))
        if read:
            return [read]
    content = yamlpos.read(file, piece.text, piece.first_line)
    quick = [ordinary.read(document.value, document.at) for document in content.documents]
    services = [read for read in quick if read]
    if not content.faults and not content.repeated and len(services) == len(quick):
        return services
    found.services += services
    found.repeated += content.repeated
    if found.repeated > yamlpos.MAX_REPEATED:  # how much that is in one text, the careful reader knows
        content.faults.append(yamlpos.Fault(yamlpos.Mark(file, piece.first_line, 1), "aliases repeat many values"))
    content.documents = [document for document, read in zip(content.documents, quick, strict=True) if not read]
    _content(content, report, found)
    return []


def _content(content: yamlpos.Text, report: Report, found: _Found) -> None:
    for fault in content.faults:
        report.add(fault.at, fault.message)
        found.complete = False
    for document in content.documents:
        if document.value is not None:
            _document(document, report, found)


def _document(document: yamlpos.Document, report: Report, found: _Found) -> None:
    if not isinstance(document.value, yamlpos.Map):
        report.add(document.at, f"a document must be a mapping with apiVersion and kind, got {shown(document.value)}")
        found.complete = False
        return
    kind = document.value.get("kind")
    fields = Fields(kind if isinstance(kind, str) else "", "", document.value, document.at, report)
    if not fields.required("kind", f"one of {', '.join(_KINDS)}"):
        found.complete = False
        return
    if isinstance(kind, str) and kind in later.KINDS:
        report.add(fields.where("kind"), later.refusal(later.KINDS[kind], "remove this document"))
        return
    if kind not in _KINDS:
        hint = f": {meant(kind, _KINDS)}" if isinstance(kind, str) else ""
        report.add(fields.where("kind"), f"unknown kind {shown(kind)}{hint}")
        found.complete = False
        return
    if fields.required("apiVersion", API_VERSION) and fields.value("apiVersion") != API_VERSION:
        fields.wrong("apiVersion", API_VERSION)
        found.complete = False
        return  # written for somebody else: what our fields are says nothing about it
    match kind:
        case "Agent":
            found.agents.append(agent.read(fields, document.at))
        case "Service":
            read = service.read(fields)
            if read.service.name:
                found.services.append(read)
            else:
                found.complete = False
        case "ServicePolicy":
            found.policies.append(policy.read(fields))
    fields.done()
