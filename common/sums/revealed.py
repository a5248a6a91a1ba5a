"""What the sums themselves tell about single sites, however well the masks hide the rest.

Lives here: `determined`. Does not live here: any cryptography.

Whoever knows every W_l knows the sum of the numbers at each class; that each site's answer sums to 1 is known too.
Take the graph with a node for each site and for each class and an edge for each number w_i p_i(l). The numbers fit
the sums just as well after adding any circulation: +1, -1, +1, ... around a cycle. So a number is determined by the
sums if and only if its edge lies on no cycle, that is, if it is a bridge of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def determined(class_sets: Mapping[str, Sequence[int]], colluding: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return, for each site, the classes of which the sums give its own probability away, exactly.

    class_sets  site -> its classes
    colluding   sites that tell what they answered: their numbers count as known, and they are left out
    Whether the range 0..1 narrows the other numbers down depends on the sample and is not looked at.
    """
    honest = [site for site in class_sets if site not in colluding]
    owners: dict[int, list[str]] = {}
    for site in honest:
        for label in class_sets[site]:
            owners.setdefault(label, []).append(site)
    bridges = _bridges(honest, owners)
    return {site: tuple(label for label in class_sets[site] if (site, label) in bridges) for site in honest}


def _bridges(sites: Sequence[str], owners: Mapping[int, Sequence[str]]) -> set[tuple[str, int]]:
    """Return the edges on no cycle, by depth-first search with low-links, without recursion."""
    # Two classes with the same two owners or more make cycles of all their edges: one of them stands for both, with a
    # parallel edge, so that the search takes time by owner sets and not by classes.
    groups: dict[tuple[str, ...], list[int]] = {}
    for label, known in owners.items():
        groups.setdefault(tuple(known), []).append(label)
    edges = [(site, number) for number, group in enumerate(groups) for site in group]
    of_site: dict[str, list[int]] = {site: [] for site in sites}
    of_group: list[list[int]] = [[] for _ in groups]
    for edge, (site, number) in enumerate(edges):
        of_site[site].append(edge)
        of_group[number].append(edge)
    members = list(groups.values())
    depth: dict[str | int, int] = {}
    low: dict[str | int, int] = {}
    found: set[tuple[str, int]] = set()
    for root in sites:
        if root in depth:
            continue
        depth[root] = low[root] = 0
        stack: list[tuple[str | int, int, int]] = [(root, -1, 0)]
        while stack:
            node, came, place = stack.pop()
            around = of_site[node] if isinstance(node, str) else of_group[node]
            if place < len(around):
                stack.append((node, came, place + 1))
                edge = around[place]
                site, number = edges[edge]
                other: str | int = number if isinstance(node, str) else site
                if edge == came:
                    continue
                if other in depth:
                    low[node] = min(low[node], depth[other])
                else:
                    depth[other] = low[other] = depth[node] + 1
                    stack.append((other, edge, 0))
            elif came >= 0:
                site, number = edges[came]
                parent = number if isinstance(node, str) else site
                low[parent] = min(low[parent], low[node])
                shared = len(members[number]) > 1 and len(of_group[number]) > 1
                if low[node] > depth[parent] and not shared:
                    found.update((site, label) for label in members[number])
    return found
