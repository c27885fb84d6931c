/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */
/* A socket's cookie, whole: bcc's own declaration of the helper cuts it to 32 bits, and then cookies repeat. */
#pragma once

static u64 (*socket_cookie)(void *) = (void *)BPF_FUNC_get_socket_cookie;
