"""Why a verdict fell: the one list for the kernel programs, the proxy, metrics, the CLI and the docs.

Kernel reasons are below KERNEL_REASONS (they are indices of the kernel's counters); the proxy's begin there. Append
only: numbers are part of the kernel's layout. TEXT must spell out every member, REMEDY says what can be done, where
there is something; docs/troubleshooting.md says the same (unit tests hold both to that).
"""

from __future__ import annotations

from enum import IntEnum

KERNEL_REASONS = 64


class Reason(IntEnum):
    # connect hook
    DIRECT = 0
    PROXY = 1
    NO_ENDPOINT = 2
    ENDPOINT_VANISHED = 3
    PROXY_NOT_IN_NETNS = 4
    PROXY_HUNG = 5
    PROXY_DOWN_REFUSED = 6
    AGENT_EXEMPT = 7
    NETNS_UNSUPPORTED = 8
    STORAGE_FULL = 9
    # sockops
    FLOW_FULL = 10
    OPENED = 11
    CLOSED = 12
    # sk_msg and the command program
    JOINED = 13
    LEFT = 14
    REDIRECTED = 15
    NOT_BOUND = 16
    NO_CREDIT = 17
    ORDER_UNPROVEN = 18
    TARGET_MISSING = 19
    READER_BLOCKS = 20
    READER_LOWAT = 21
    NOT_TCP = 22
    SOCKET_UNKNOWN = 23
    MEMBERS_FULL = 24
    UNREAD = 25
    NOT_ESTABLISHED = 26
    READER_MAY_SPLICE = 27
    PROXY_ABSENT = 28
    SOCKET_TAKEN = 29
    SENDER_ZEROCOPY = 30
    PEER_SENDING = 31
    READER_UNCHECKED = 32
    NO_STAGE = 33
    READER_COUNTS = 34
    BOUND_TO_DEVICE = 35
    # UDP: sendmsg, recvmsg, and connect of a UDP socket
    UNANSWERED = 36
    ENDPOINT_GONE = 37
    ANSWERED = 38
    DATAGRAMS_FULL = 39
    PLACE_TAKEN = 40
    MPTCP = 41
    AFFINITY_FULL = 42
    OVER_LIMIT = 43
    LIMIT_FULL = 44
    # proxy
    NO_ORIGIN = 64
    NO_SERVICE = 65
    NO_HEALTHY_UPSTREAM = 66
    CONNECT_FAILED = 67
    CONNECT_TIMEOUT = 68
    UPSTREAM_RESET = 69
    UPSTREAM_PROTOCOL_ERROR = 70
    REQUEST_TIMEOUT = 71
    BAD_REQUEST = 72
    HEAD_TOO_LARGE = 73
    CONNECT_METHOD = 74
    HEAD_TIMEOUT = 75
    BODY_TIMEOUT = 76
    IDLE_TIMEOUT = 77
    TOO_MANY_CONNECTIONS = 78
    TOO_MANY_PENDING = 79
    DOWNSTREAM_CLOSED = 80
    DRAINING = 81
    HTTP2_NOT_YET = 82
    UPSTREAM_CLOSED_EARLY = 83
    EXPECTATION_UNKNOWN = 84
    STREAM_IDLE_TIMEOUT = 85
    SNI_MISSING = 86
    NOT_TLS = 87
    HELLO_TOO_LARGE = 88
    HELLO_CUT = 89
    HELLO_TIMEOUT = 90

    @property
    def word(self) -> str:
        """How logs, metrics and headers write it."""
        return self.name.lower()


TEXT: dict[Reason, str] = {
    Reason.DIRECT: "connection led straight to an endpoint",
    Reason.PROXY: "connection led to the proxy in the caller's namespace",
    Reason.NO_ENDPOINT: "the service has no endpoint that takes new connections: the caller got an error",
    Reason.ENDPOINT_VANISHED: "an endpoint was removed between two table reads; another one was tried",
    Reason.PROXY_NOT_IN_NETNS: "no proxy listener in the caller's namespace: onProxyDown applied, the agent told",
    Reason.PROXY_HUNG: "the proxy's heartbeat is older than a second: onProxyDown applied",
    Reason.PROXY_DOWN_REFUSED: "refused because the proxy is down and onProxyDown is refuse",
    Reason.AGENT_EXEMPT: "the agent's own connection, by its cgroup: left alone",
    Reason.NETNS_UNSUPPORTED: "this kernel cannot tell namespaces apart (before 5.14): onProxyDown applied",
    Reason.STORAGE_FULL: "no memory for the socket's storage: governed connections follow onProxyDown",
    Reason.FLOW_FULL: "the original destination could not be stored: the proxy closes this connection",
    Reason.MPTCP: "MPTCP connections established through us, on their first path",
    Reason.OPENED: "connections established through us",
    Reason.CLOSED: "connections of ours that ended",
    Reason.JOINED: "a socket entered the redirect table",
    Reason.LEFT: "a socket left the redirect table",
    Reason.REDIRECTED: "a send handed from socket to socket",
    Reason.NOT_BOUND: "a send by TCP: the socket's binding is off",
    Reason.NO_CREDIT: "a send by TCP: too many bytes not known to be read",
    Reason.ORDER_UNPROVEN: "a send by TCP: TCP bytes moved since the binding was proven",
    Reason.TARGET_MISSING: "a send by TCP: the peer is no longer in the redirect table",
    Reason.READER_BLOCKS: "not carried: the application reads with blocking calls",
    Reason.READER_LOWAT: "not carried: the application set SO_RCVLOWAT",
    Reason.NOT_TCP: "not carried: MPTCP, kTLS or another protocol than plain TCP",
    Reason.SOCKET_UNKNOWN: "not carried: the socket was not found, or is not one that connect led to the proxy",
    Reason.MEMBERS_FULL: "not carried: the redirect table is full (raise Agent.spec.maps.members)",
    Reason.UNREAD: "not carried yet: bytes are unread or unacknowledged",
    Reason.NOT_ESTABLISHED: "not carried: the connection is closing",
    Reason.READER_MAY_SPLICE: "not carried: the application holds pipes and may read by splice",
    Reason.PROXY_ABSENT: "no proxy is running: onProxyDown applied",
    Reason.SOCKET_TAKEN: "not carried: another sockmap, or another user of the socket's private data, owns it",
    Reason.SENDER_ZEROCOPY: "not carried: the application set SO_ZEROCOPY and would wait for completions",
    Reason.PEER_SENDING: "kept in the redirect table for now: the peer is in the middle of a call",
    Reason.READER_UNCHECKED: "not carried yet: the application's process was not looked at",
    Reason.READER_COUNTS: "an answer by TCP: this kernel hides redirected bytes from readers that use FIONREAD",
    Reason.PLACE_TAKEN: "another connection had the place for this decision: kept with the socket, a little dearer",
    Reason.BOUND_TO_DEVICE: "the caller's socket is bound to a device, where no proxy listens: onProxyDown applied",
    Reason.UNANSWERED: "no answer for a second: the socket's next datagram was led to another endpoint",
    Reason.ENDPOINT_GONE: "the socket's endpoint left the service: its next datagram was led to another one",
    Reason.ANSWERED: "a datagram of an endpoint, shown as one of the service",
    Reason.DATAGRAMS_FULL: "a UDP socket could not be noted: it keeps its endpoint, whatever becomes of that",
    Reason.AFFINITY_FULL: "a client's endpoint could not be noted: its next connection may get another one",
    Reason.OVER_LIMIT: "refused: connectionPool.tcp.maxConnections connections to the service are open",
    Reason.LIMIT_FULL: "the service's open connections could not be counted: let through in spite of maxConnections",
    Reason.NO_STAGE: "a send by TCP: no redirect program is loaded",
    Reason.NO_ORIGIN: "a connection that no connect hook led here (port dialled directly): closed",
    Reason.NO_SERVICE: "the address dialled belongs to no service of the current mesh",
    Reason.NO_HEALTHY_UPSTREAM: "the service has no endpoint that takes new connections",
    Reason.CONNECT_FAILED: "the endpoint refused the connection or could not be reached",
    Reason.CONNECT_TIMEOUT: "the endpoint did not accept within connectTimeout",
    Reason.UPSTREAM_RESET: "the endpoint closed or reset the connection before it answered",
    Reason.UPSTREAM_PROTOCOL_ERROR: "the endpoint's answer is not valid HTTP/1.1",
    Reason.REQUEST_TIMEOUT: "no answer within timeouts.request",
    Reason.BAD_REQUEST: "the request is malformed or its framing ambiguous: nothing of it reached an endpoint",
    Reason.HEAD_TOO_LARGE: "the request head is over the limit of line, header count or size",
    Reason.CONNECT_METHOD: "CONNECT is not served",
    Reason.HEAD_TIMEOUT: "the request head did not arrive in time",
    Reason.BODY_TIMEOUT: "the request body stopped arriving",
    Reason.IDLE_TIMEOUT: "an idle connection was closed",
    Reason.TOO_MANY_CONNECTIONS: "connectionPool.tcp.maxConnections reached",
    Reason.TOO_MANY_PENDING: "connectionPool.http.http1MaxPendingRequests reached",
    Reason.DOWNSTREAM_CLOSED: "the caller went away before the answer was complete",
    Reason.DRAINING: "cut: the proxy ended, and it was not over within proxy.drain",
    Reason.HTTP2_NOT_YET: "HTTP/2 is relayed as TCP until it is served",
    Reason.UPSTREAM_CLOSED_EARLY: "the endpoint closed in the middle of its answer",
    Reason.EXPECTATION_UNKNOWN: "an Expect other than 100-continue",
    Reason.STREAM_IDLE_TIMEOUT: "no byte moved either way for five minutes while a request was served",
    Reason.SNI_MISSING: "a TLS client that names no server: passed on as it came",
    Reason.NOT_TLS: "no TLS hello on a tls port: passed on as it came, for the endpoint to answer",
    Reason.HELLO_TOO_LARGE: "a TLS hello over 16 KiB, whose name is not looked for: passed on as it came",
    Reason.HELLO_CUT: "the caller ended in the middle of its TLS hello: passed on as it came",
    Reason.HELLO_TIMEOUT: "no whole TLS hello within 15 s: closed, and no endpoint was dialled",
}

# What somebody can do about it. A reason that is not here asks for nothing.
REMEDY: dict[Reason, str] = {
    Reason.NO_ENDPOINT: "meshbpf endpoints SERVICE",
    Reason.PROXY_NOT_IN_NETNS: "the agent's log, if there are more than one or two for each new namespace",
    Reason.PROXY_HUNG: "the agent's log; is the machine out of CPU?",
    Reason.PROXY_DOWN_REFUSED: "meshbpf run, or onProxyDown: direct",
    Reason.NETNS_UNSUPPORTED: "meshbpf check, netns-cookies",
    Reason.STORAGE_FULL: "free memory in the caller's cgroup",
    Reason.FLOW_FULL: "raise Agent.spec.maps.flows",
    Reason.MEMBERS_FULL: "raise Agent.spec.maps.members",
    Reason.UNANSWERED: "many: an endpoint is down. meshbpf endpoints SERVICE, and ask each one itself",
    Reason.DATAGRAMS_FULL: "raise Agent.spec.maps.datagrams",
    Reason.AFFINITY_FULL: "look at the machine's memory",
    Reason.OVER_LIMIT: "meshbpf services shows how many are open; raise the limit, or look why they stay open",
    Reason.LIMIT_FULL: "raise Agent.spec.maps.policies",
    Reason.PROXY_ABSENT: "meshbpf run",
    Reason.SOCKET_TAKEN: "meshbpf check, foreign-sk-msg",
    Reason.NO_ORIGIN: "call the service's address",
    Reason.NO_SERVICE: "was the service removed? meshbpf services",
    Reason.NO_HEALTHY_UPSTREAM: "meshbpf endpoints SERVICE",
    Reason.CONNECT_FAILED: "is the program running, on this address and port?",
    Reason.CONNECT_TIMEOUT: "is it overloaded, or filtered by a firewall?",
    Reason.UPSTREAM_RESET: "the endpoint's own log",
    Reason.UPSTREAM_PROTOCOL_ERROR: "is it HTTP at all? protocol: tcp relays anything",
    Reason.REQUEST_TIMEOUT: "raise timeouts.request, or look why the endpoint is slow",
    Reason.BAD_REQUEST: "mend the caller",
    Reason.HEAD_TOO_LARGE: "fewer or shorter headers; cookies are the usual cause",
    Reason.CONNECT_METHOD: "call the service directly",
    Reason.HEAD_TIMEOUT: "a caller that opens connections and says nothing",
    Reason.BODY_TIMEOUT: "a caller that stalls",
    Reason.TOO_MANY_CONNECTIONS: "raise maxConnections, or add endpoints",
    Reason.TOO_MANY_PENDING: "raise http1MaxPendingRequests, or add endpoints",
    Reason.DOWNSTREAM_CLOSED: "the caller's timeout may be too short",
    Reason.UPSTREAM_CLOSED_EARLY: "the endpoint's own log",
    Reason.DRAINING: "raise Agent.spec.proxy.drain; what lives for hours is better in mode: direct",
    Reason.EXPECTATION_UNKNOWN: "mend the caller",
    Reason.NOT_TLS: "is it the right port? protocol: tcp reads nothing",
    Reason.HELLO_TIMEOUT: "does the server speak first? Then the port is tcp, not tls",
    Reason.STREAM_IDLE_TIMEOUT: "does the endpoint still work on it, does the caller read?",
}
