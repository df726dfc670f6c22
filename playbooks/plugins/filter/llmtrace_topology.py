"""Ansible filter: the model servers that the inventory's variables describe."""

from dataclasses import asdict

from ansible.errors import AnsibleFilterError

from llmtrace.deploy.topology import model_servers
from llmtrace.errors import UserError


def llmtrace_model_servers(variables):
    """Return a list of mappings: name, role, port, sidecar_port, side_channel_port, endpoint_port."""
    try:
        servers = model_servers(variables)
    except UserError as error:
        raise AnsibleFilterError(str(error)) from None
    return [asdict(server) | {"endpoint_port": server.endpoint_port} for server in servers]


class FilterModule:
    """The filters of this file."""

    def filters(self):
        """Return them by name."""
        return {"llmtrace_model_servers": llmtrace_model_servers}
