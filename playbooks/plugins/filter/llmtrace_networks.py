"""Ansible filter: networks as Envoy's address ranges."""

from ipaddress import ip_network

from ansible.errors import AnsibleFilterError


def llmtrace_prefix_ranges(networks):
    """Return Envoy's CidrRange of each network, such as 10.0.0.0/8."""
    if not isinstance(networks, list):
        raise AnsibleFilterError(f"trace_context_networks is {networks!r}: give a list, such as [10.0.0.0/8]")
    ranges = []
    for text in networks:
        try:
            network = ip_network(str(text))
        except ValueError as error:
            raise AnsibleFilterError(f"trace_context_networks: {error}; give networks such as 10.0.0.0/8") from None
        ranges.append({"address_prefix": str(network.network_address), "prefix_len": network.prefixlen})
    return ranges


class FilterModule:
    """The filters of this file."""

    def filters(self):
        """Return them by name."""
        return {"llmtrace_prefix_ranges": llmtrace_prefix_ranges}
