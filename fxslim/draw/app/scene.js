"use strict";
// Draw a placed view with d3: modules, links, cards.

const CHARACTER = 7.3; // width of one character of the names' font at 12 px

function clip(text, width) {
  const most = Math.max(Math.floor(width / CHARACTER), 4);
  if (text.length <= most) return text;
  const head = Math.floor((most - 1) / 3);
  return text.slice(0, head) + "\u2026" + text.slice(text.length - (most - 1 - head));
}

const percent = (ratio) => (ratio === 1 ? "100" : (100 * ratio).toFixed(ratio < 0.1 ? 1 : 0)) + "\u2009%";
const counted = (box, mode) => {
  const all = box.units.toLocaleString("en"), kept = box.kept.toLocaleString("en");
  if (mode === "before" || (mode === "plain")) return `${all} ${box.unit}`;
  return mode === "after" ? `${kept} ${box.unit}` : `${kept} of ${all} ${box.unit}`;
};

/** Draw one copy of a view; handlers: open, fold, hover, leave. */
function drawScene(root, scene, mode, model, handlers) {
  const arrow = (link) => "link kind-" + model.kind(link.group) + (link.certain ? "" : " unsure");
  const line = d3.line((p) => p.x, (p) => p.y).curve(d3.curveBasis);

  const cluster = root.append("g").selectAll("g").data(scene.clusters).join("g").attr("class", "cluster");
  cluster.append("rect").attr("class", "area").attr("rx", 10)
    .attr("x", (c) => c.x - c.width / 2).attr("y", (c) => c.y - c.height / 2)
    .attr("width", (c) => c.width).attr("height", (c) => c.height);

  const link = root.append("g").selectAll("g").data(scene.links).join("g");
  link.append("path").attr("class", arrow).attr("d", (l) => line(l.points)).attr("marker-end", "url(#arrow)");
  link.append("path").attr("class", "link-hit").attr("d", (l) => line(l.points))
    .on("pointermove", (event, l) => handlers.hover(event, linkFacts(l, model))).on("pointerleave", handlers.leave);

  const legend = cluster.append("g").attr("class", "legend").attr("role", "button").attr("tabindex", -1)
    .attr("aria-label", (c) => `Fold the module ${c.path}`).attr("data-module", (c) => c.path)
    .attr("transform", (c) => `translate(${c.x - c.width / 2 + 12},${c.y - c.height / 2 - 10})`)
    .on("click", (_, c) => handlers.fold(c.path)).on("keydown", (event, c) => event.key === "Enter" && handlers.fold(c.path));
  const title = (c) => clip("\u2212 " + (model.nested.get(c.path) ? c.path.slice(model.nested.get(c.path).length + 1) : c.path), c.width - 60);
  legend.append("rect").attr("rx", 6).attr("height", 20).attr("width", (c) => title(c).length * 6.8 + 16);
  legend.append("text").attr("class", "name").attr("x", 8).attr("y", 14).text(title);
  root.append(() => legendsAbove(cluster));

  const node = root.append("g").selectAll("g").data(scene.nodes).join("g")
    .attr("class", (n) => `node ${n.type} kind-${model.kindOf(n)}`)
    .attr("data-id", (n) => n.id).attr("tabindex", -1).attr("role", "button").attr("aria-label", (n) => spoken(n, model))
    .attr("transform", (n) => `translate(${n.x - n.width / 2},${n.y - n.height / 2})`)
    .on("click", (event, n) => handlers.open(n, event)).on("focus", (_, n) => handlers.focus(n))
    .on("pointermove", (event, n) => handlers.hover(event, facts(n, model))).on("pointerleave", handlers.leave);
  node.append("rect").attr("class", "card").attr("rx", 8).attr("width", (n) => n.width).attr("height", (n) => n.height);
  node.filter((n) => n.type === "site").each(function (n) { drawSite(d3.select(this), n, mode, model); });
  node.filter((n) => n.type === "op").each(function (n) { drawOp(d3.select(this), n, mode, model); });
  node.filter((n) => n.type === "folded").each(function (n) { drawFolded(d3.select(this), n, model); });
  node.filter((n) => n.type === "end" || n.type === "stub").append("text").attr("class", "small name")
    .attr("x", (n) => n.width / 2).attr("y", 18).attr("text-anchor", "middle")
    .text((n) => clip(n.label || (n.from ? "from " : "to ") + shortOp(n.op), n.width - 14));
}

/** Legends lie above links. */
function legendsAbove(cluster) {
  const layer = document.createElementNS("http://www.w3.org/2000/svg", "g");
  cluster.select(".legend").each(function () { layer.append(this); });
  layer.setAttribute("class", "cluster");
  return layer;
}

function drawSite(g, n, mode, model) {
  const box = n.box, wide = n.width - 24;
  const width = wide * model.scale(box) * (mode === "after" ? box.kept / box.units : 1);
  const filled = mode === "kept" ? width * (box.kept / box.units) : width;
  g.append("rect").attr("class", "edge").attr("width", 4).attr("height", n.height - 16).attr("x", 0).attr("y", 8).attr("rx", 2);
  const name = model.short(n), kind = box.kind.replace("_", " ");
  if (name !== kind) g.append("text").attr("class", "chip").attr("x", n.width - 12).attr("y", 20).attr("text-anchor", "end").text(kind);
  g.append("text").attr("class", "name").attr("x", 12).attr("y", 20).text(clip(name, wide - (name === kind ? 0 : kind.length * 6.2 + 8)));
  g.append("text").attr("class", "small").attr("x", 12).attr("y", 38).text(counted(box, model.narrowed ? mode : "plain"));
  if (model.narrowed && mode !== "before")
    g.append("text").attr("class", "small").attr("x", n.width - 12).attr("y", 38).attr("text-anchor", "end").text(percent(box.kept / box.units));
  g.append("rect").attr("class", "units").attr("x", 12).attr("y", 46).attr("height", 12).attr("rx", 2).attr("width", Math.max(width, 3));
  g.append("rect").attr("class", "kept").attr("x", 12).attr("y", 46).attr("height", 12).attr("rx", 2).attr("width", Math.max(filled, 2));
  const parts = box.groups > 1 && box.groups <= 16 && mode !== "after" ? box.groups : 0;
  for (let i = 1; i < parts; i += 1)
    g.append("line").attr("class", "tick").attr("x1", 12 + (width * i) / parts).attr("x2", 12 + (width * i) / parts).attr("y1", 46).attr("y2", 58);
}

const shortOp = (op) => op.op.replace(/^aten\./, "");

function drawOp(g, n, mode, model) {
  const op = n.op, role = model.roleOf(op);
  const shape = mode === "after" ? op.after || op.shape : mode === "before" || !op.after ? op.shape : `${op.shape} \u2192 ${op.after}`;
  g.append("rect").attr("class", "edge").attr("width", 4).attr("height", n.height - 16).attr("y", 8).attr("rx", 2);
  g.append("text").attr("class", "name").attr("x", 12).attr("y", 20).text(clip(shortOp(op), n.width - 24 - (role.length + (op.pinned.length ? 6 : 0)) * 7));
  const marks = g.append("text").attr("x", n.width - 12).attr("y", 20).attr("text-anchor", "end").attr("class", "role");
  if (op.pinned.length) marks.append("tspan").attr("class", "pin").style("fill", "var(--warn)").text("pinned" + (role ? " " : ""));
  if (role) marks.append("tspan").text(role);
  const fits = clip(shape, (n.width - 24) * 1.12);
  g.append("text").attr("class", "small name" + (op.after && mode !== "before" ? " changed" : "")).attr("x", 12).attr("y", 36).text(fits);
  g.append("text").attr("class", "small").attr("x", 12).attr("y", 48).style("font-size", "9.5px").text(op.dtype);
}

function drawFolded(g, n, model) {
  const sites = n.holds.filter((one) => one.box);
  g.append("text").attr("class", "name").attr("x", 12).attr("y", 20).text("+ " + clip(model.short(n), n.width - 40));
  if (!sites.length) {
    g.append("text").attr("class", "small").attr("x", 12).attr("y", 38).text(`${n.holds.length} operations`);
    return;
  }
  g.append("text").attr("class", "small").attr("x", n.width - 12).attr("y", 20).attr("text-anchor", "end").text(`${sites.length} sites`);
  const each = (n.width - 24) / Math.min(sites.length, 24);
  sites.slice(0, 24).forEach((one, i) => {
    const bar = g.append("g").attr("class", "kind-" + one.box.kind);
    for (const [name, ratio] of [["units", 1], ["kept", one.box.kept / one.box.units]])
      bar.append("rect").attr("class", name).attr("x", 12 + i * each).attr("y", 31).attr("height", 9).attr("width", Math.max((each - 4) * ratio, 1));
  });
}

function spoken(n, model) {
  if (n.box) return `${n.box.name}, ${counted(n.box, "kept")} kept`;
  if (n.type === "folded") return `Module ${n.module}, folded, ${n.holds.length} inside`;
  if (n.op) return `${shortOp(n.op)} ${model.roleOf(n.op)}, ${n.op.shape}${n.op.after ? ", then " + n.op.after : ""}`;
  return n.label;
}

/** What the tooltip says: a heading and lines. */
function facts(n, model) {
  if (n.box) {
    const groups = n.box.groups ? [`in ${n.box.groups} groups`] : [];
    return [n.box.name, `${n.box.kind.replace("_", " ")}: ${counted(n.box, "kept")} kept`, ...groups, ...(n.box.note ? [n.box.note] : [])];
  }
  if (n.op)
    return [n.op.name, `${n.op.op} in ${n.op.module || "the model itself"}`, `${n.op.shape} ${n.op.dtype}` + (n.op.after ? `, then ${n.op.after}` : ""),
      ...n.op.tensors, ...n.op.roles.map(([site, role]) => `${role} of ${site}`), ...n.op.pinned.map((why) => `pinned: ${why}`)];
  if (n.type === "folded") return [n.module, model.classes.get(n.module) || "", `${n.holds.length} inside; click to unfold`];
  return [n.label === "input" ? "where the model begins" : "where the model ends"];
}

function linkFacts(l, model) {
  const groups = (l.groups && l.groups.length ? l.groups : [l.group]).filter(Boolean).map((id) => model.groups.get(id)).filter(Boolean);
  const size = l.shape ? [l.shape + (l.after ? ` \u2192 ${l.after}` : "")] : [];
  const named = groups.map((group) => [group.id, group.width ? `${group.width} wide` : "", group.reason].filter(Boolean).join("; "));
  const unsure = l.certain ? [] : ["the order of execution; what feeds what is not known"];
  return [groups.length ? groups[0].id : "no labels", ...size, ...(named.length ? named : l.certain ? ["nothing in it could go"] : []), ...unsure];
}
