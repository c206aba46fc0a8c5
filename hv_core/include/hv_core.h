/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What hv_core offers to other modules: ports, at which connections of children end. A child posts messages to a connection and signals its
 * events (HvCallPostMessage, HvCallSignalEvent; TLFS 11.9); the port's owner sends messages and events to the SynIC of its VPs.
 */
#ifndef _HV_CORE_H
#define _HV_CORE_H

#include <linux/types.h>

struct hv_port;

/*
 * What becomes of what the guest sends. Each function gets the context of hv_port_connect() and the VP, and returns the status of the guest's
 * hypercall: HV_STATUS_SUCCESS, or HV_STATUS_INSUFFICIENT_BUFFERS to have it try again. Process context, of the thread that runs the VP, several at a
 * time; may sleep, and may send by the port. NULL is answered with HV_STATUS_INVALID_PORT_ID. The type, the payload's contents and the flag are the
 * guest's: trust nothing in them. The payload has at most 240 bytes, a copy that does not change.
 */
struct hv_port_ops {
	u16 (*post_message)(void *context, u32 vp, u32 type, const void *payload, u32 size);
	u16 (*signal_event)(void *context, u32 vp, u16 flag);
};

/*
 * Connects a port of the caller to connection number @connection (24 bits) of the partition with that number. May sleep. An error pointer: ENODEV without a
 * hypervisor, ENOENT without the partition, EEXIST if it has the connection, EINVAL, ENOSPC, ENOMEM. The partition may die while its ports live.
 */
struct hv_port *hv_port_connect(u64 partition, u32 connection, const struct hv_port_ops *ops, void *context);

/* Undoes it and frees the port; afterwards no function of it runs. May sleep; not from such a function. */
void hv_port_disconnect(struct hv_port *port);

/*
 * Sends a message to SynIC source @source (0 to 15) of a VP (HvCallPostMessageDirect). May sleep. 0; -EAGAIN if the guest has not yet taken an earlier one;
 * -EINVAL for parameters that make no sense; -ENODEV if the partition is gone.
 */
int hv_port_post_message(struct hv_port *port, u32 vp, u32 source, u32 type, const void *payload, u32 size);

/* Sets event flag @flag (0 to 2047) of a SynIC source of a VP (HvCallSignalEventDirect). May sleep. 0, -EINVAL or -ENODEV. */
int hv_port_signal_event(struct hv_port *port, u32 vp, u32 source, u16 flag);

#endif
