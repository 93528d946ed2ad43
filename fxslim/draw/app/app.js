"use strict";
// The page: what is open, folded and selected; everything that a mouse or a keyboard can do.

const MOST = { sites: 140, ops: 60 }; // boxes that are shown unfolded at first
const picture = JSON.parse(document.getElementById("picture").textContent);
const byName = new Map(picture.sites.map((box) => [box.name, box]));
const groups = new Map(picture.groups.map((group) => [group.id, group]));
const widest = d3.rollup(picture.sites, (boxes) => d3.max(boxes, (box) => box.units), (box) => box.unit);
const byId = (id) => document.getElementById(id);
const svg = d3.select("#graph");

const model = {
  picture, groups, classes: new Map(picture.modules), nested: new Map(), narrowed: picture.narrowed, open: null,
  kind(id) { const group = groups.get(id); return byName.has(id) ? byName.get(id).kind : group ? group.kind : "none"; },
  kindOf(node) { return node.box ? node.box.kind : node.op && node.op.groups.length ? model.kind(node.op.groups[0]) : "none"; },
  scale: (box) => box.units / widest.get(box.unit),
  short(node) {
    const outer = around(node.type === "folded" ? parent(node.module) : node.module, model.nested);
    const inner = outer ? node.module.slice(outer.length + 1) : node.module;
    return inner || (node.box ? node.box.kind.replace("_", " ") : node.module);
  },
  roleOf(op) { const own = op.roles.find(([site]) => site === model.open) || op.roles[0]; return own ? own[1] : ""; },
};
const state = { mode: picture.narrowed ? "kept" : "before", closed: new Set(), view: null, scene: null, selected: null };

// --- What is shown

function route() {
  const [, what, value] = /^#(site|module)=(.*)$/.exec(location.hash) || [];
  try { return what ? [what, decodeURIComponent(value)] : ["sites", ""]; } catch { return ["sites", ""]; }
}

function show() {
  const [what, name] = route();
  const box = what === "site" ? byName.get(name) : undefined;
  model.open = box && box.ops.length ? box.name : null;
  if (model.open) state.view = opView(picture, box.ops);
  else if (what === "module") state.view = opView(picture, picture.ops.flatMap((op, i) => (within(op.module, name) ? [i] : [])));
  else state.view = picture.sites.length || !picture.ops.length ? siteView(picture) : opView(picture, picture.ops.map((_, i) => i));
  const inner = state.view.nodes.filter((node) => node.type !== "stub" && node.type !== "end");
  model.nested = nestInside(inner.map((node) => node.module));
  state.closed = foldedAtFirst(state.view, model.nested, inner.some((node) => node.box) ? MOST.sites : MOST.ops);
  state.selected = null;
  crumbs(what, name);
  render();
  fit();
  details(null);
  outline();
  say(model.open ? `Opened ${model.open}: ${inner.length} operations.` : `${inner.length} boxes.`);
}

function render() {
  const view = folded(state.view, model.nested, state.closed);
  state.scene = placed(view, model.nested);
  svg.selectAll("*").remove();
  svg.append("defs").append("marker").attr("id", "arrow").attr("viewBox", "0 0 8 8").attr("refX", 7).attr("refY", 4)
    .attr("markerWidth", 8).attr("markerHeight", 8).attr("markerUnits", "userSpaceOnUse").attr("orient", "auto")
    .append("path").attr("d", "M0,0 L8,4 L0,8 z").attr("fill", "context-stroke");
  const root = svg.append("g").attr("id", "world");
  const copies = state.mode === "both" ? ["before", "after"] : [state.mode];
  copies.forEach((mode, i) => {
    const copy = root.append("g").attr("data-copy", mode).attr("transform", `translate(${i * (state.scene.width + 60)},${copies.length > 1 ? 34 : 0})`);
    if (copies.length > 1) copy.append("text").attr("class", "heading").attr("x", 16).attr("y", -8).text(mode === "before" ? "Before" : "After");
    drawScene(copy, state.scene, mode, model, handlers);
  });
  svg.attr("aria-label", model.open ? `Operations of ${model.open}` : "Site graph");
  const first = svg.select(".node").node();
  if (first) first.setAttribute("tabindex", 0);
  byId("empty").hidden = view.nodes.length > 0;
  byId("empty").textContent = "There is nothing to draw: no sites and no operations.";
  byId("fold").textContent = state.closed.size ? "Unfold" : "Fold";
  byId("fold").disabled = model.nested.size === 0;
}

function crumbs(what, name) {
  const home = make("button", { onclick: () => go("") }, picture.sites.length ? "all sites" : "graph");
  const here = what === "sites" ? [] : [" \u203a ", make("code", {}, name || "all operations")];
  byId("crumbs").replaceChildren(...(what === "sites" ? [] : [home, ...here]));
}

const go = (hash) => { if (location.hash.replace(/^#/, "") === hash) show(); else location.hash = hash; };
const openSite = (name) => {
  if (byName.get(name).ops.length) return go("site=" + encodeURIComponent(name));
  if (route()[0] !== "sites") go("");
  return select("s:" + name, true);
};
const openModule = (path) => go("module=" + encodeURIComponent(path));

function openOp(number) {
  const box = picture.sites.find((one) => one.ops.includes(number));
  const hash = box ? "site=" + encodeURIComponent(box.name) : "module=" + encodeURIComponent(picture.ops[number].module);
  history.pushState(null, "", "#" + hash);
  show();
  select("o:" + number, true);
}

// --- Selection and details

function select(id, centred) {
  state.selected = id;
  svg.selectAll(".node").classed("selected", (n) => n.id === id).attr("tabindex", (n) => (n.id === id ? 0 : -1));
  const node = state.scene.nodes.find((one) => one.id === id);
  details(node || null);
  if (node && centred) centre(node);
  return node;
}

function details(node) {
  const parts = node && node.box ? siteDetails(node.box, model) : node && node.op ? opDetails(node.op, model)
    : model.open ? siteDetails(byName.get(model.open), model) : summary(model);
  if (node && node.type === "folded") parts.unshift(title(node.module));
  byId("details").replaceChildren(...parts);
}

function outline() { return drawOutline(byId("outline"), model, byId("search").value, { site: openSite, op: openOp, module: openModule }); }
function say(text) { byId("said").textContent = text; }

// --- Folding

function fold(path) { state.closed.add(path); changed("m:" + path); }
function unfold(path) {
  state.closed.delete(path);
  for (const [inner, outer] of model.nested) if (outer === path) state.closed.delete(inner);
  changed(null);
}
function foldAll() {
  const roots = [...model.nested].filter(([, outer]) => outer === "").map(([path]) => path);
  state.closed = new Set(state.closed.size ? [] : roots);
  changed(null);
}
function changed(id) { render(); fit(); details(null); if (id) { const node = select(id, false); if (node) element(id).focus(); } }

// --- Moving about

const zoom = d3.zoom().scaleExtent([0.05, 3]).filter((event) => event.type !== "wheel" && event.type !== "dblclick" && !event.button)
  .on("zoom", (event) => { svg.select("#world").attr("transform", event.transform); leave(); });
svg.call(zoom).on("wheel", (event) => {
  event.preventDefault();
  const scale = d3.zoomTransform(svg.node()).k;
  if (event.ctrlKey || event.metaKey) svg.call(zoom.scaleBy, 2 ** (-event.deltaY / 200), d3.pointer(event));
  else svg.call(zoom.translateBy, -(event.shiftKey ? event.deltaY : event.deltaX) / scale, -(event.shiftKey ? 0 : event.deltaY) / scale);
}, { passive: false });

function extent() {
  const copies = state.mode === "both" ? 2 : 1;
  return [state.scene.width * copies + 60 * (copies - 1), state.scene.height + (copies > 1 ? 34 : 0)];
}

/** Show everything if it can be read, or else its beginning; asked for, everything. */
function fit(all = false) {
  const { clientWidth: width, clientHeight: height } = svg.node();
  const [wide, high] = extent();
  if (!wide || !width) return;
  const whole = Math.min(1, width / (wide + 24), height / (high + 24));
  const broad = Math.min(1, width / (wide + 24));
  const scale = all || whole >= 0.6 ? whole : Math.max(broad, state.mode === "both" ? 0.3 : 0.45);
  const x = wide * scale > width ? 12 : (width - wide * scale) / 2;
  svg.call(zoom.transform, d3.zoomIdentity.translate(x, Math.max((height - high * scale) / 2, 14)).scale(scale));
}

function centre(node) {
  const t = d3.zoomTransform(svg.node()), { clientWidth: width, clientHeight: height } = svg.node();
  const [x, y] = t.apply([node.x, node.y]);
  if (x < 40 || y < 40 || x > width - 40 || y > height - 40) svg.call(zoom.translateTo, node.x, node.y);
}

const element = (id) => svg.selectAll(".node").filter((n) => n.id === id).node();

/** The next box in a direction: along links up and down if there are any, else the nearest one. */
function neighbour(id, key) {
  const here = state.scene.nodes.find((node) => node.id === id);
  if (!here) return state.scene.nodes[0];
  const along = key === "ArrowDown" ? [["source", "target"]] : key === "ArrowUp" ? [["target", "source"]] : [];
  const linked = along.flatMap(([from, to]) => state.scene.links.filter((link) => link[from] === id).map((link) => link[to]));
  const ahead = { ArrowDown: (n) => n.y > here.y + 1, ArrowUp: (n) => n.y < here.y - 1, ArrowRight: (n) => n.x > here.x + 1, ArrowLeft: (n) => n.x < here.x - 1 }[key];
  const some = state.scene.nodes.filter((node) => (linked.length ? linked.includes(node.id) : ahead(node)));
  const sideways = along.length ? 1 : 3;
  return d3.least(some, (n) => Math.abs(n.x - here.x) + sideways * Math.abs(n.y - here.y));
}

// --- Mouse and keyboard

const handlers = {
  open(node) {
    if (node.type === "folded") return unfold(node.module);
    if (node.box) return openSite(node.box.name);
    return select(node.id, false);
  },
  fold,
  focus(node) { select(node.id, true); },
  hover(event, [title, ...lines]) {
    const tip = byId("tip");
    tip.replaceChildren(make("b", {}, title), ...lines.filter(Boolean).map((line) => make("span", {}, line)));
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + "px";
  },
  leave() { byId("tip").hidden = true; },
};
const leave = handlers.leave;

svg.on("keydown", (event) => {
  const node = event.target.closest(".node");
  if (!node) return;
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); handlers.open(d3.select(node).datum()); return; }
  if (!event.key.startsWith("Arrow")) return;
  event.preventDefault();
  const next = neighbour(node.dataset.id, event.key);
  if (next) element(next.id).focus();
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.id === "search";
  if (event.key === "Escape") {
    leave();
    if (typing && byId("search").value) { byId("search").value = ""; outline(); return; }
    if (typing) { byId("search").blur(); return; }
    if (route()[0] !== "sites") {
      const back = model.open; // shown again by the listener that came first
      addEventListener("hashchange", () => back && focusOn("s:" + back), { once: true });
      go("");
    }
    return;
  }
  if (typing && (event.key === "Enter" || event.key === "ArrowDown")) {
    const first = document.querySelector("#outline button");
    if (first) event.key === "Enter" ? first.click() : first.focus();
    event.preventDefault();
    return;
  }
  if (event.target.closest("#outline") && /^Arrow(Up|Down)$/.test(event.key)) {
    const all = [...document.querySelectorAll("#outline button")], at = all.indexOf(event.target);
    (all[at + (event.key === "ArrowDown" ? 1 : -1)] || byId("search")).focus();
    event.preventDefault();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = { "/": () => byId("search").focus(), 0: () => fit(true), "+": () => step(1.3), "-": () => step(1 / 1.3), f: foldAll, d: theme };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});

function focusOn(id) { const found = element(id); if (found) found.focus(); }
function step(factor) { svg.call(zoom.scaleBy, factor); }
function theme() { setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); }
function setTheme(name) { document.documentElement.dataset.theme = name; }

byId("search").addEventListener("input", () => say(`${outline()} found.`));
byId("modes").hidden = !picture.narrowed;
for (const button of byId("modes").children)
  button.addEventListener("click", () => { setMode(button.dataset.mode); render(); fit(); if (state.selected) select(state.selected, false); });
function setMode(mode) {
  state.mode = mode;
  document.querySelector("main").classList.toggle("wide", mode === "both");
  for (const button of byId("modes").children) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
}
for (const [id, act] of [["fold", foldAll], ["fit", () => fit(true)], ["in", () => step(1.3)], ["out", () => step(1 / 1.3)], ["theme", theme], ["print", () => print()]])
  byId(id).addEventListener("click", act);
addEventListener("hashchange", show);
let onPaper = null; // the theme to go back to, while the page is printed
addEventListener("resize", () => onPaper || fit());
addEventListener("beforeprint", () => {
  onPaper = document.documentElement.dataset.theme;
  setTheme("light");
  const [wide, high] = extent();
  svg.attr("viewBox", `-8 -8 ${wide + 16} ${high + 16}`).select("#world").attr("transform", null);
});
addEventListener("afterprint", () => { setTheme(onPaper); onPaper = null; svg.attr("viewBox", null); fit(); });

byId("title").textContent = picture.title;
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
setMode(state.mode);
show();
performance.mark("fxslim:ready");
