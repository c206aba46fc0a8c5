// SPDX-License-Identifier: GPL-2.0
/*
 * hv_port: a port of another module, for tests of hv_core. "PARTITION CONNECTION" written to the parameter "connect" moves it there, an empty line away. A
 * message comes back to source 3 of the VP that posted it, with its type and size; one of type 2 finds no room. An event comes back as the next flag
 * of that source.
 */
#include <linux/err.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <hyperv/hvgdk_mini.h>
#include <hv_core.h>

#define SOURCE 3

static struct hv_port *port;
static DEFINE_MUTEX(lock);

static u16 post_message(void *context, u32 vp, u32 type, const void *payload, u32 size)
{
	struct hv_port **at = context;

	if (type == 2)
		return HV_STATUS_INSUFFICIENT_BUFFERS;
	switch (hv_port_post_message(READ_ONCE(*at), vp, SOURCE, type, payload, size)) {
	case 0:
		return HV_STATUS_SUCCESS;
	case -EAGAIN:
		return HV_STATUS_INSUFFICIENT_BUFFERS;
	default:
		return HV_STATUS_INVALID_PARAMETER;
	}
}

static u16 signal_event(void *context, u32 vp, u16 flag)
{
	struct hv_port **at = context;

	if (hv_port_signal_event(READ_ONCE(*at), vp, SOURCE, flag + 1))
		return HV_STATUS_INVALID_PARAMETER;
	return HV_STATUS_SUCCESS;
}

static const struct hv_port_ops ops = {
	.post_message = post_message,
	.signal_event = signal_event,
};

static void disconnect(void)
{
	if (port)
		hv_port_disconnect(port);
	WRITE_ONCE(port, NULL);
}

static int set_connect(const char *text, const struct kernel_param *parameter)
{
	unsigned int connection;
	struct hv_port *new;
	u64 partition;
	int error = 0;

	mutex_lock(&lock);
	disconnect();
	if (*text != '\n' && *text) {
		if (sscanf(text, "%llu %u", &partition, &connection) == 2) {
			new = hv_port_connect(partition, connection, &ops, &port);
			error = PTR_ERR_OR_ZERO(new);
			if (!error)
				WRITE_ONCE(port, new);
		} else {
			error = -EINVAL;
		}
	}
	mutex_unlock(&lock);
	return error;
}

static const struct kernel_param_ops connect_ops = {
	.set = set_connect,
};

module_param_cb(connect, &connect_ops, NULL, 0200);
MODULE_PARM_DESC(connect, "Partition and connection at which the port is");

static int __init hv_port_init(void)
{
	return 0;
}

static void __exit hv_port_exit(void)
{
	disconnect();
}

module_init(hv_port_init);
module_exit(hv_port_exit);
MODULE_DESCRIPTION("A port of another module, for tests of hv_core");
MODULE_LICENSE("GPL");
