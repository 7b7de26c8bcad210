# SPDX-License-Identifier: Apache-2.0
"""What OpenShell's supervisor asks of a sandbox in each of its modes, and what of that comes back from a checkpoint."""

from .harness import Net, RunscError, Sandbox

CAPABILITIES = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL NET_ADMIN NET_RAW SETGID SETPCAP SETUID SYS_ADMIN SYS_PTRACE".split()


def rights(value):
    names = [f"CAP_{name}" for name in CAPABILITIES]
    value["process"]["capabilities"] = {kind: names for kind in ("bounding", "effective", "permitted")}


def asked(net, port, inner):
    return net.get(f"/supervisor?host=169.254.17.1&port={port}&inner={int(inner)}", timeout=20)


def supervisor(lab):
    """What do full, process and sidecar modes need, is it there, and does it come back from a checkpoint?"""
    seen = {}
    for inner in (False, True):
        mark = lab.mark()
        net = Net(lab)
        port, _ = net.echo_server()
        box = Sandbox(lab, net, change=rights, root_change=rights).boot()
        steps = seen["with an inner network namespace" if inner else "without"] = {"before": asked(net, port, inner)}
        try:
            image = lab.image()
            box.checkpoint(image)
            box.destroy()
            net.rebuild()
            again = Sandbox(lab, net, change=rights, root_change=rights, ate=box.ate)
            again.restore(image)
            port, _ = net.echo_server()
            steps["after"] = asked(net, port, inner)
        except (RunscError, OSError) as error:
            steps["after"] = f"{error}"[-300:]
        lab.undo(mark)
    return seen


EXPERIMENTS = {"supervisor": supervisor}
