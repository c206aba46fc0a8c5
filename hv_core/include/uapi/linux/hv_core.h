/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/* What files of /dev/mshv take beyond <linux/mshv.h>. */
#ifndef _UAPI_LINUX_HV_CORE_H
#define _UAPI_LINUX_HV_CORE_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* The connection is removed. fd is the one that it was made with. */
#define HV_PORT_EVENTFD_DEASSIGN	(1U << 0)

/*
 * On a partition: when the guest signals event flag 0 of the connection (HvCallSignalEvent), the eventfd is signalled. Other flags are
 * INVALID_PARAMETER for the guest, messages INVALID_PORT_ID.
 *
 * EINVAL if there are unknown flags, the connection has more than 24 bits or fd is no eventfd; EBADF; EEXIST if the connection is in use;
 * ENOENT if what shall be removed is not there; ENOSPC after 4096 connections.
 */
struct hv_port_eventfd {
	__u32 connection;
	__s32 fd;
	__u32 flags;
	__u32 reserved;
};

#define HV_PORT_EVENTFD	_IOW(0xB8, 0xC0, struct hv_port_eventfd)

#endif
