"use strict";
// What one view shows (boxes, links, modules around them), and where dagre puts it.

const SIZE = { site: [264, 68], op: [196, 54], stub: [168, 28], end: [110, 28], folded: [264, 50] };

const within = (path, outer) => outer === "" || path === outer || path.startsWith(outer + ".");
const parent = (path) => path.slice(0, Math.max(path.lastIndexOf("."), 0));

/** The modules that hold more than one thing: path -> the one around it ("" for none); as parents() in picture.py. */
function nest(paths) {
  const inside = new Map();
  paths.forEach((path, number) => {
    const parts = path ? path.split(".") : [];
    parts.forEach((_, at) => {
      const own = parts.slice(0, at + 1).join(".");
      if (!inside.has(own)) inside.set(own, new Set());
      inside.get(own).add(at + 1 < parts.length ? parts[at + 1] : "=" + number);
    });
  });
  const kept = new Set([...inside].filter(([, below]) => below.size > 1).map(([path]) => path));
  return new Map([...kept].sort().map((path) => [path, around(parent(path), kept)]));
}

/** The same without a module that holds everything: it says nothing. */
function nestInside(paths) {
  const nested = nest(paths);
  const roots = [...nested].filter(([, outer]) => outer === "").map(([path]) => path);
  if (roots.length !== 1 || nested.size === 1 || !paths.every((path) => within(path, roots[0]))) return nested;
  nested.delete(roots[0]);
  for (const [path, outer] of nested) if (outer === roots[0]) nested.set(path, "");
  return nested;
}

/** The nearest of the kept paths (keys of a Map, or a Set) at or above a path. */
function around(path, kept) {
  while (path && !kept.has(path)) path = parent(path);
  return path;
}

/** The site graph. */
function siteView(picture) {
  const nodes = picture.sites.map((box) => ({ id: "s:" + box.name, type: "site", module: box.module, box }));
  const links = picture.feeds.map((feed) => ({ ...feed, source: "s:" + feed.source, target: "s:" + feed.target }));
  for (const end of ["input", "output"])
    if (links.some((link) => link.source === "s:" + end || link.target === "s:" + end))
      nodes.push({ id: "s:" + end, type: "end", module: "", label: end });
  return { nodes, links };
}

/** Operations, with stubs for what they read from outside and for what reads them there. */
function opView(picture, members) {
  const inside = new Set(members);
  const nodes = new Map(members.map((i) => [i, { id: "o:" + i, type: "op", module: picture.ops[i].module, op: picture.ops[i], number: i }]));
  const links = [];
  const outside = (i, from) => {
    const id = (from ? "f:" : "t:") + i;
    if (!nodes.has(id)) nodes.set(id, { id, type: "stub", module: "", op: picture.ops[i], number: i, from });
    return id;
  };
  picture.ops.forEach((op, i) => {
    for (const source of op.inputs) {
      if (!inside.has(i) && !inside.has(source)) continue;
      const flow = picture.ops[source];
      links.push({
        source: inside.has(source) ? "o:" + source : outside(source, true),
        target: inside.has(i) ? "o:" + i : outside(i, false),
        group: flow.groups[0] || "", groups: flow.groups, shape: flow.shape, after: flow.after, certain: true,
      });
    }
  });
  return { nodes: [...nodes.values()], links };
}

/** Put one node in the place of every folded module. */
function folded(view, nested, closed) {
  const shown = new Map();
  const of = new Map();
  for (const node of view.nodes) {
    let top = null;
    if (node.type !== "stub" && node.type !== "end")
      for (let path = around(node.module, nested); path; path = nested.get(path)) if (closed.has(path)) top = path;
    const id = top === null ? node.id : "m:" + top;
    of.set(node.id, id);
    if (top === null) shown.set(id, node);
    else if (!shown.has(id)) shown.set(id, { id, type: "folded", module: top, holds: [node] });
    else shown.get(id).holds.push(node);
  }
  const links = new Map();
  for (const link of view.links) {
    const [source, target] = [of.get(link.source), of.get(link.target)];
    if (source === target) continue;
    const key = JSON.stringify([source, target, link.group]);
    if (!links.has(key)) links.set(key, { ...link, source, target });
  }
  return { nodes: [...shown.values()], links: [...links.values()] };
}

/** Which modules to fold so that no more than so many boxes are shown at first. */
function foldedAtFirst(view, nested, most) {
  const closed = new Set([...nested].filter(([, outer]) => outer === "").map(([path]) => path));
  if (view.nodes.length <= most) return new Set();
  for (let changed = true; changed; ) {
    changed = false;
    for (const path of [...closed]) {
      const open = new Set(closed);
      open.delete(path);
      for (const [inner, outer] of nested) if (outer === path) open.add(inner);
      if (folded(view, nested, open).nodes.length > most) continue;
      closed.delete(path);
      for (const inner of open) closed.add(inner);
      changed = true;
    }
  }
  return closed;
}

/** Let dagre place boxes and links. */
function placed(view, nested) {
  const graph = new dagre.graphlib.Graph({ compound: true, multigraph: true });
  graph.setGraph({ rankdir: "TB", nodesep: 26, edgesep: 14, ranksep: 34, marginx: 16, marginy: 16,
    ranker: view.nodes.length > 62 ? "tight-tree" : "network-simplex" });
  graph.setDefaultEdgeLabel(() => ({}));
  const used = new Set();
  for (const node of view.nodes) {
    const [width, height] = SIZE[node.type];
    graph.setNode(node.id, { width, height });
    let outer = node.type === "folded" ? nested.get(node.module) : around(node.module, nested);
    if (node.type === "stub" || node.type === "end") outer = "";
    if (outer) graph.setParent(node.id, join(outer));
  }
  function join(path) {
    const id = "c:" + path;
    if (used.has(path)) return id;
    used.add(path);
    graph.setNode(id, {});
    if (nested.get(path)) graph.setParent(id, join(nested.get(path)));
    return id;
  }
  view.links.forEach((link, number) => graph.setEdge(link.source, link.target, { number }, String(number)));
  dagre.layout(graph);
  const nodes = view.nodes.map((node) => ({ ...node, ...graph.node(node.id) }));
  const links = graph.edges().map((edge) => ({ ...view.links[graph.edge(edge).number], points: graph.edge(edge).points }));
  const depth = (path) => (nested.get(path) ? 1 + depth(nested.get(path)) : 0);
  const clusters = [...used].map((path) => ({ path, depth: depth(path), ...graph.node("c:" + path) })).sort((a, b) => a.depth - b.depth);
  return { nodes, links, clusters, width: graph.graph().width || 0, height: graph.graph().height || 0 };
}
