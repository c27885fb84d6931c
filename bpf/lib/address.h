/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/*
 * Addresses as the tables hold them: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. All byte order lives here.
 * They are moved as four words, because the verifier takes whole words and context fields are words.
 */
#pragma once

#define MAPPED __builtin_bswap32(0x0000ffff)
#define LOOPBACK4 __builtin_bswap32(0x7f000001)
#define LOOPBACK6 __builtin_bswap32(0x00000001)
#define BROADCAST4 0xffffffff
#define ALL_NODES6 __builtin_bswap32(0xff020000)
#define FAMILY_IPV4 2
#define FAMILY_IPV6 10

static __always_inline void set_address4(u8 *address, u32 ip4)
{
	u32 *word = (u32 *)address;

	word[0] = 0;
	word[1] = 0;
	word[2] = MAPPED;
	word[3] = ip4;
}

static __always_inline void set_address6(u8 *address, u32 a, u32 b, u32 c, u32 d)
{
	u32 *word = (u32 *)address;

	word[0] = a;
	word[1] = b;
	word[2] = c;
	word[3] = d;
}

static __always_inline void copy_address(u8 *to, const u8 *from)
{
	const u32 *word = (const u32 *)from;

	set_address6(to, word[0], word[1], word[2], word[3]);
}

static __always_inline bool same_address(const u8 *left, const u8 *right)
{
	const u32 *a = (const u32 *)left, *b = (const u32 *)right;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

static __always_inline bool is_ipv4(const u8 *address)
{
	const u32 *word = (const u32 *)address;

	return word[0] == 0 && word[1] == 0 && word[2] == MAPPED;
}
