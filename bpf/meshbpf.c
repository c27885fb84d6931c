/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* The one text that is compiled: loader/source.py inlines these files in this order. Nothing else belongs here. */
#include <uapi/linux/bpf.h>

#define __always_inline inline __attribute__((always_inline))
#include "connect.c"
#include "datagram.c"
#include "sockops.c"
#if REDIRECT
#include "command.c"
#include "redirect.c"
#endif
