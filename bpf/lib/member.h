/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * What the kernel's own structures say about a socket that is, or wants to be, in the redirect table.
 *
 * The AT_* offsets come from the running kernel's BTF (loader/btf.py); a kernel without one of them runs
 * without this file (REDIRECT=0). `tcp` is always what bpf_skc_to_tcp_sock() gave: its fields, and those of
 * the structures it points to, are plain loads that the kernel guards; a pointer that is 0 reads as 0.
 * sk_psock hangs on a void pointer, which the verifier does not follow, so it is read by
 * probe_read_kernel().
 */
#pragma once

#define ESTABLISHED 1
#define IPPROTO_TCP_ 6
#define NONBLOCKING 00004000 /* O_NONBLOCK */
#define POINTER_BITS (~7ULL) /* sk_user_data keeps flags in its low bits */
#define FIELD(_type, _base, _at) (*(volatile _type *)((void *)(_base) + (_at)))

/* By its number: bcc would turn a call of its own name into bpf_probe_read, which sk_msg may not call, whenever it
 * cannot see the symbol in kallsyms, and that takes CAP_SYSLOG. */
static long (*probe_read_kernel)(void *to, u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;

/* The socket's sk_psock as a number, or 0. Only a socket of our own table may be asked for what is inside. */
static __always_inline u64 psock_of(void *tcp)
{
	return FIELD(u64, tcp, AT_SOCK_USER_DATA) & POINTER_BITS;
}

/* Has the reader taken everything that was redirected to it? A message leaves the list when its last byte was
 * copied out, so an empty list says that every byte is read. */
static __always_inline bool redirected_all_read(void *tcp)
{
	u64 psock = psock_of(tcp), first = 0;

	if (!psock)
		return true;
	if (probe_read_kernel(&first, sizeof(first), (void *)(psock + AT_PSOCK_INGRESS)))
		return false;
	return first == psock + AT_PSOCK_INGRESS;
}

/* Is a thread inside send or recv of this member? Every such call holds a reference to the psock, and the
 * table holds the first one. A sender that decided to redirect before its binding went off holds it until the
 * bytes have landed: this is what makes deleting its target safe, where waiting for some milliseconds would
 * only make it likely. */
static __always_inline bool in_call(void *tcp)
{
	u64 psock = psock_of(tcp);
	u32 references = 0;

	if (!psock)
		return false;
	return probe_read_kernel(&references, sizeof(references), (void *)(psock + AT_PSOCK_REFCNT)) ||
	       references != 1;
}

/* Something between the socket and TCP: kTLS (sk_msg would see, and redirect, what is about to be encrypted),
 * or a subflow of MPTCP (crashed kernels when it met a sockmap). */
static __always_inline bool not_plain_tcp(void *tcp)
{
	if (FIELD(u64, tcp, AT_ULP_OPS))
		return true;
#ifdef AT_IS_MPTCP
	if (FIELD(u8, tcp, AT_IS_MPTCP) & AT_IS_MPTCP_MASK)
		return true;
#endif
	return false;
}

/* Why the application's socket may not be a member (REASON_JOINED: it may). Asked before it joins and again
 * on each of its sends, because an application may change its mind: a member whose reader blocks gets EAGAIN
 * out of a signal or a reset, ignores SO_RCVLOWAT, and a zero-copy sender would wait for ever for
 * completions. */
static __always_inline enum reason unfit(void *tcp)
{
	void *socket, *file;

	if (not_plain_tcp(tcp))
		return REASON_NOT_TCP;
	socket = FIELD(void *, tcp, AT_SOCK_SOCKET);
	file = FIELD(void *, socket, AT_SOCKET_FILE);
	if (!(FIELD(u32, file, AT_FILE_FLAGS) & NONBLOCKING))
		return REASON_READER_BLOCKS;
	if (FIELD(int, tcp, AT_SOCK_RCVLOWAT) > 1)
		return REASON_READER_LOWAT;
	if (FIELD(u64, tcp, AT_SOCK_FLAGS) >> SOCK_ZEROCOPY & 1)
		return REASON_SENDER_ZEROCOPY;
	return REASON_JOINED;
}
