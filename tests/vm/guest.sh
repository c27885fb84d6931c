#!/usr/bin/env bash
# Rule: the life of one meshbpf on this kernel: check, attach, calls, run, calls, detach, nothing left.
# Each step prints `vm STEP PASS|FAIL seconds detail`; what a failed step said follows, indented. A later step is tried anyway.
readonly APPS=/sys/fs/cgroup/apps DIRECT=http://127.96.0.10/hello GOVERNED=http://127.96.0.11/hello
cd /mesh/tests/vm || exit 1

step() { # name, command...
	local name=$1 started=$SECONDS verdict=PASS
	shift
	"$@" >/tmp/said 2>&1 || verdict=FAIL
	printf 'vm %s %s %ss %s\n' "$name" "$verdict" $((SECONDS - started)) "$(grep -v '^ *$' /tmp/said | tail -n 1 | cut -c1-120)"
	[ $verdict = PASS ] || sed 's/^/    /' /tmp/said
}

mesh() { timeout 120 meshbpf "$@"; }
call() { curl --silent --show-error --fail --max-time 20 "$1"; }
member() { mesh exec --cgroup $APPS -- curl --silent --show-error --fail --max-time 20 "$1"; }
refused() { # curl's own word for it, and no other way to fail
	"$@"
	[ $? -eq 7 ]
}
until_true() { # process that must live, seconds, command...
	local process=$1 end=$((SECONDS + $2))
	shift 2
	until "$@" >/dev/null 2>&1; do
		kill -0 "$process" 2>/dev/null && [ $SECONDS -lt $end ] || return 1
		sleep 0.2
	done
}

check() { # 79: warnings only
	mesh check --pre
	case $? in 0 | 79) ;; *) return 1 ;; esac
}
attach() { mkdir -p $APPS && mesh attach --cgroup $APPS -c mesh.yaml; }
outside() { refused call $DIRECT; }
ready() { until_true "$agent" 60 call http://127.0.0.1:15020/readyz || { cat /tmp/agent; return 1; }; }
# The proxy gives every request an x-request-id, which the endpoint saw: nothing but the proxy can have carried it.
proxied() { member $GOVERNED >/tmp/answer && cat /tmp/answer && grep -qi '^x-request-id: ' /tmp/answer; }
unproxied() { member $GOVERNED >/tmp/answer && ! grep -qi '^x-request-id: ' /tmp/answer; }
datagrams() { mesh exec --cgroup $APPS -- python3 datagrams.py ask 127.96.0.12 53; }
detach() { mesh detach; }
gone() {
	[ -z "$(find /sys/fs/bpf -mindepth 2)" ] || { find /sys/fs/bpf; return 1; }
	! kill -0 "$agent" 2>/dev/null || { echo "agent $agent still runs"; return 1; }
	refused member $DIRECT
}

step kernel uname -r
python3 echo.py 8081 &
step endpoint until_true $! 30 call http://127.0.0.1:8081/
step check check
step attach attach
step outside-is-untouched outside
step direct-call member $DIRECT
python3 datagrams.py serve 8082 &
step datagrams datagrams
step governed-call-without-agent unproxied
meshbpf run --cgroup $APPS -c mesh.yaml >/tmp/agent 2>&1 &
agent=$!
step agent-ready ready
step direct-call-with-agent member $DIRECT
step proxied-call proxied
step status mesh status
step services mesh services
step detach detach
step nothing-left gone
