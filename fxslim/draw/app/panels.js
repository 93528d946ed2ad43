"use strict";
// The panels at the sides: the outline with its search, and details of what is selected. Text is set as text, never as HTML.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A name that may be broken after its dots. */
const title = (name) => make("h2", { class: "name" }, ...name.split(/(?<=[.:_])/).flatMap((part) => [part, make("wbr")]));

/** Which sites and operations a query finds; all sites without one. */
function found(picture, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const has = (text) => words.every((word) => text.toLowerCase().includes(word));
  const sites = picture.sites.filter((box) => has([box.name, box.kind, ...box.rows.map((row) => row.tensor)].join(" ")));
  const ops = words.length ? picture.ops.map((op, i) => [op, i]).filter(([op]) => has([op.name, op.op, op.module, ...op.tensors, ...op.pinned].join(" "))) : [];
  return { sites, ops };
}

function drawOutline(place, model, query, handlers) {
  const { sites, ops } = found(model.picture, query);
  const nested = nest(model.picture.sites.map((box) => box.module));
  const rows = [];
  let heading = null;
  for (const box of sites) {
    const module = around(box.module, nested);
    if (module !== heading) rows.push(make("h2", { class: "name" }, module || "the model itself"));
    heading = module;
    const short = box.module === module ? box.kind : box.module.slice(module ? module.length + 1 : 0) || box.kind;
    const meter = make("span", { class: "meter" }, make("i", { style: `width:${(100 * box.kept) / box.units}%` }));
    rows.push(make("button", { class: "kind-" + box.kind + (model.open === box.name ? " current" : ""), "data-site": box.name, title: box.name,
      onclick: () => handlers.site(box.name) }, make("span", { class: "name" }, short),
      make("span", { class: "count" }, model.narrowed ? `${box.kept} / ${box.units}` : `${box.units} ${box.unit}`), meter));
  }
  if (ops.length) rows.push(make("h2", {}, `${ops.length} operations`));
  for (const [op, number] of ops.slice(0, 40))
    rows.push(make("button", { "data-op": number, title: op.module, onclick: () => handlers.op(number) },
      make("span", { class: "name" }, op.name), make("span", { class: "count" }, shortOp(op))));
  if (!rows.length) rows.push(make("p", { class: "none" }, query ? "Nothing is called so." : "There are no sites."));
  if (!query && model.picture.ops.length)
    rows.push(make("h2", {}, "graph"), make("button", { "data-module": "", onclick: () => handlers.module("") },
      make("span", { class: "name" }, "all operations"), make("span", { class: "count" }, String(model.picture.ops.length))));
  place.replaceChildren(...rows);
  return sites.length + ops.length;
}

const pairs = (rows) => make("dl", {}, ...rows.filter(([, value]) => value !== "").flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
const heading = (text) => make("h3", {}, text);

function table(columns, rows) {
  const cell = (tag, text, i) => make(tag, columns[i].endsWith("#") ? { class: "number" } : {}, text.replace(/#$/, ""));
  return make("table", {}, make("thead", {}, make("tr", {}, ...columns.map((text, i) => cell("th", text, i)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text, i) => cell("td", String(text), i))))));
}

/** Which units are kept, as a strip. */
function strip(box) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of [["viewBox", `0 0 ${box.units} 1`], ["preserveAspectRatio", "none"], ["class", "strip"], ["role", "img"], ["aria-label", `${box.kept} of ${box.units} are kept`]])
    svg.setAttribute(name, value);
  for (const [first, count] of box.keep) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of [["x", first], ["width", count], ["height", 1]]) rect.setAttribute(name, value);
    svg.append(rect);
  }
  return make("div", { class: "kind-" + box.kind }, svg);
}

function siteDetails(box, model) {
  const parts = [title(box.name), pairs([
    ["kind", box.kind.replace("_", " ")], ["units", `${box.units.toLocaleString("en")} ${box.unit}`],
    ["kept", model.narrowed ? `${box.kept.toLocaleString("en")} (${percent(box.kept / box.units)})` : ""],
    ["groups", box.groups ? `${box.groups}, equally many in each` : ""],
    ["damage", box.damage === null ? "" : box.damage.toPrecision(3)], ["module", `${box.module} ${model.classes.get(box.module) || ""}`]])];
  if (box.note) parts.push(make("p", { class: "muted" }, box.note));
  if (model.narrowed) parts.push(heading("Which units are kept"), strip(box));
  if (box.roles.length) parts.push(heading("Roles, as the pattern names them"), table(["role", "weights"], box.roles.map(([role, names]) => [role, names.map((name) => name.replace(box.module + ".", "")).join(", ")])));
  parts.push(heading("Rows that follow the units"), table(model.narrowed ? ["tensor", "dim#", "rows#", "left#"] : ["tensor", "dim#", "rows#"],
    box.rows.map((row) => [row.tensor.replace(box.module + ".", ""), row.dim, row.size.toLocaleString("en"), ...(model.narrowed ? [row.left.toLocaleString("en")] : [])])));
  return parts;
}

function opDetails(op, model) {
  const parts = [title(op.name), pairs([["operation", op.op], ["module", `${op.module} ${model.classes.get(op.module) || ""}`],
    ["shape", op.shape], ["after", op.after], ["left", op.after ? percent(op.ratio) : ""], ["dtype", op.dtype]])];
  if (op.pinned.length) parts.push(heading("Pinned here, because"), make("ul", {}, ...op.pinned.map((why) => make("li", {}, why))));
  if (op.roles.length) parts.push(heading("Roles"), table(["role", "site"], op.roles.map(([site, role]) => [role, site])));
  if (op.tensors.length) parts.push(heading("Tensors"), make("ul", {}, ...op.tensors.map((name) => make("li", { class: "name" }, name))));
  const groups = op.groups.map((id) => model.groups.get(id)).filter(Boolean);
  if (groups.length) parts.push(heading("What flows through"), key(groups, model));
  return parts;
}

const key = (groups, model) => make("div", { class: "key" }, ...groups.flatMap((group) => [make("i", { class: "kind-" + model.kind(group.id) }),
  make("span", {}, group.id + (group.width ? `, ${group.width.toLocaleString("en")} wide` : ""), ...(group.reason ? [make("span", { class: "muted" }, `: ${group.reason}`)] : []))]));

function summary(model) {
  const picture = model.picture, parts = [make("h2", {}, picture.title)];
  const kinds = d3.rollups(picture.sites, (boxes) => boxes, (box) => box.kind);
  if (picture.totals.length) parts.push(table(["", "before#", "after#", "left#"], picture.totals.map((total) => [total.name, total.before.toLocaleString("en"), total.after.toLocaleString("en"), total.before ? percent(total.after / total.before) : ""])));
  parts.push(heading("Sites"), make("div", { class: "key" }, ...kinds.flatMap(([kind, boxes]) => [make("i", { class: "kind-" + kind }),
    make("span", {}, `${boxes.length} ${kind.replace("_", " ")}` + (model.narrowed ? `: ${percent(d3.sum(boxes, (box) => box.kept) / d3.sum(boxes, (box) => box.units))} kept` : ""))])));
  parts.push(make("p", { class: "muted" }, "A bar is as wide as the site has units, among sites with units of the same sort" + (model.narrowed ? "; its filled part is kept." : ".")));
  const shared = picture.groups.filter((group) => group.kind !== "site");
  if (shared.length) parts.push(heading("Also flowing"), key(shared, model));
  if (picture.stays.length) {
    parts.push(heading("What stays, and why"));
    for (const [reason, all] of d3.groups(picture.stays, (stay) => stay.reason))
      parts.push(make("details", {}, make("summary", {}, `${reason} (${all.length})`), make("ul", {}, ...all.map((stay) => make("li", { class: "name" }, stay.where)))));
  }
  for (const note of picture.notes) parts.push(make("p", { class: "muted" }, `${note.where}: ${note.reason}`));
  return parts;
}
