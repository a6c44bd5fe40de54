// Client of the Preview tab: LoRA rows, base against LoRA, the image in progress.
//
// The rows are built here, so that no response replaces a slider that is being moved. The server's state comes with a
// revision; each change made here gets the next one.
(() => {
  const { one, all, get, post, press, make, refocus } = window.easel;
  const MOST = 1.5;
  let rows = [], apart = false, groups = [], rev = -1, project = null, mark = "", sending = false;

  const sent = () => rows.map(({ file, strength, text }) => ({ file, strength, text: apart ? text ?? strength : null }));
  window.easel.loraRows = () => (one("#loras")?.dataset.ready ? JSON.stringify({ rows: sent(), apart }) : "");

  // ---- the rows -------------------------------------------------------------------------------------------------
  const files = (row) => {
    const select = make("select", { className: "field", data: { part: "file" }, attributes: { "aria-label": "LoRA file" } });
    const known = groups.flatMap(([, found]) => found.map(([, file]) => file));
    for (const [heading, found] of groups) {
      const group = make("optgroup", { label: heading });
      for (const [title, file] of found) group.append(make("option", { value: file, textContent: title }));
      select.append(group);
    }
    select.append(make("option", { value: "", textContent: "A file elsewhere: type its path" }));
    select.value = known.includes(row.file) ? row.file : "";
    return select;
  };

  const dial = (row, index, part, words) => {
    const value = part === "text" ? row.text ?? row.strength : row.strength;
    const label = rows.length > 1 ? `${words} of LoRA ${index + 1}` : words;
    const range = make("input", { type: "range", min: 0, max: MOST, step: 0.05, value, data: { part }, attributes: { "aria-label": label } });
    const number = make("input", { type: "number", step: 0.05, value, className: "field", data: { part, typed: "1" }, attributes: { "aria-label": `${label}, typed` } });
    return make("div", { className: "dial", id: index || part === "text" ? "" : "strength" }, make("span", { className: "small", textContent: words }), range, number);
  };

  const rowOf = (row, index) => {
    const select = files(row);
    const away = make("button", { type: "button", className: "own icon", title: "Remove this LoRA", data: { removeLora: index }, attributes: { "aria-label": `Remove LoRA ${index + 1}` } }, "×");
    const path = make("input", { type: "text", className: "field", value: row.file, hidden: select.value !== "", placeholder: "Path of a .safetensors file", spellcheck: false, data: { part: "path" }, attributes: { "aria-label": `Path of LoRA ${index + 1}` } });
    const head = make("div", { className: "lora-head", id: index ? "" : "preview-lora" }, select, away, path);
    const dials = [dial(row, index, "strength", apart ? "UNet" : "LoRA strength")];
    if (apart) dials.push(dial(row, index, "text", "Text encoder"));
    return make("div", { className: "lora-row", data: { row: index }, attributes: { role: "group", "aria-label": `LoRA ${index + 1}` } }, head, ...dials);
  };

  const show = () => {
    const place = one("#loras");
    if (!place) return;
    const add = make("button", { type: "button", className: "own", id: "add-lora", textContent: rows.length ? "Add another LoRA" : "Add a LoRA" });
    const box = make("input", { type: "checkbox", checked: apart, id: "text-apart" });
    const note = rows.length ? [] : [make("p", { className: "small", textContent: "Without a LoRA the base alone is drawn." })];
    const more = make("details", { open: apart || Boolean(one("details", place)?.open) }, make("summary", { textContent: "Advanced" }), make("label", { className: "small check" }, box, " Text encoder strength apart from the UNet's"));
    refocus(place, () => place.replaceChildren(...rows.map(rowOf), ...note, add, ...(rows.length ? [more] : [])));
    place.dataset.ready = "1";
  };

  // One request at a time, in order; `later` holds what changed while one was in flight.
  let later = null;
  const send = async (moved) => {
    if (sending) { later = { moved: moved || Boolean(later?.moved) }; return; }
    sending = true;
    try {
      const answer = await post("preview/rows", { rows: sent(), apart, moved });
      if (answer.rev !== undefined) rev = Math.max(rev, answer.rev);
      if (answer.drawn) { follow(); press("refresh"); }
    } catch { /* The next press of Generate takes the rows along anyway. */ } finally { sending = false; }
    const next = later;
    later = null;
    if (next) send(next.moved); else read();
  };
  let timer = null;
  const changed = (moved, wait) => { clearTimeout(timer); timer = setTimeout(() => { timer = null; send(moved); }, wait); };

  const read = () => {
    const place = one("#preview-base-note");
    if (!place || !one("#loras") || sending || timer || (place.dataset.mark === mark && one("#loras").dataset.ready)) return;
    let data;
    try { data = JSON.parse(place.dataset.loras); } catch { return; }
    // A longer list of files, or rows that follow the newest run, can wait while the user is
    // editing them.
    const held = document.activeElement?.matches("#loras select, #loras input");
    const followed = data.rev === 0 && rev <= 0 && JSON.stringify([data.rows, data.apart]) !== JSON.stringify([rows, apart]);
    const listed = JSON.stringify(data.groups) !== JSON.stringify(groups);
    const fresh = data.project !== project || data.rev > rev || !one("#loras").dataset.ready;
    mark = fresh || !held ? place.dataset.mark : "";
    if (fresh || (followed && !held)) ({ rows, apart, rev, project } = data);
    if (fresh || ((followed || listed) && !held)) { groups = data.groups; show(); }
  };

  document.addEventListener("input", (event) => {
    const target = event.target;
    if (target.id === "text-apart") { apart = target.checked; show(); changed(true, 0); one("#text-apart").focus(); return; }
    const index = target.closest?.("#loras [data-row]")?.dataset.row, part = target.dataset?.part;
    if (index === undefined || !part) { if (target.classList.contains("split")) split(target.value); return; }
    const row = rows[index];
    if (part === "file" || part === "path") {
      row.file = target.value;
      if (part === "file") {
        const path = one("[data-part=path]", target.closest("[data-row]"));
        path.hidden = target.value !== "";
        path.value = target.value;
        if (!path.hidden) path.focus();
      }
      changed(false, part === "path" ? 400 : 0);
      return;
    }
    const value = Number(target.value);
    if (target.value === "" || !Number.isFinite(value)) return;
    row[part] = value;
    for (const twin of all(`[data-part=${part}]`, target.closest(".dial"))) if (twin !== target) twin.value = value;
    if (one("#preview-result")) working();
    changed(true, 60);
  });

  // ---- the image in progress ----------------------------------------------------------------------------------------
  const split = (value) => document.documentElement.style.setProperty("--split", `${value}%`);
  const working = () => {
    const state = one("#preview-state"), cancel = one("#cancel-drawing");
    if (!state) return;
    Object.assign(state.dataset, { state: "working", busy: "1" });
    state.className = "small num";
    state.textContent = "Drawing";
    if (cancel) { cancel.disabled = false; cancel.title = ""; }
    follow();
  };

  let following = false;
  const follow = async () => {
    if (following) return;
    following = true;
    let looks = 0, before = "";
    try {
      for (let quiet = 0; quiet < 20;) {
        await new Promise((done) => setTimeout(done, 250));
        if (document.hidden || !one("#preview-state")?.offsetParent) { quiet += 1; continue; }
        const now = await get("preview/now");
        const state = one("#preview-state"), image = one("#compare img.look");
        if (now.state === "working" && now.words && state?.dataset.state === "working") state.textContent = now.words;
        if (image && now.state === "working" && now.looks && now.looks !== looks) { image.src = `/easel/preview/look?n=${now.at}-${now.looks}`; image.hidden = false; }
        if (image && now.state !== "working") image.hidden = true;
        looks = now.looks;
        const after = `${now.state} ${now.at} ${now.pictures}`;
        if (after !== before || (now.state !== "working" && state?.dataset.state === "working")) press("refresh");
        before = after;
        quiet = now.busy ? 0 : quiet + 5;
      }
    } catch { /* The window is away; its poll says so. */ } finally { following = false; }
  };

  // ---- opening the tab: once the strip of the run that was just trained, else a first image if requested ------------
  let wasOpen = false, wanted = false;
  const opened = async () => {
    try {
      const answer = await post("preview/open", {});
      if (answer.fill) { press("preview-fill"); follow(); } else if (answer.drawn) press("refresh");
      if (!answer.drawn && wanted) first();
    } catch { /* As above. */ } finally { wanted = false; }
  };
  const first = (tries = 40) => {
    const ready = one("#generate") && one("#preview-state") && one("#loras")?.dataset.ready && one("#prompt textarea")?.value;
    if (!ready && tries) setTimeout(() => first(tries - 1), 100);
    else if (!one("#preview-base")) press("generate");
  };

  document.addEventListener("click", async (event) => {
    const target = event.target.closest("button, a");
    if (!target) return;
    const data = target.dataset;
    if (target.id === "generate" || target.id === "draw-strip") working();
    else if (target.id === "cancel-drawing") { await post("preview/cancel", {}); press("refresh"); }
    else if (target.id === "add-lora") {
      rows.push({ file: groups[0]?.[1]?.[0]?.[1] ?? "", strength: 1, text: null });
      show();
      changed(false, 0);
      one(`#loras [data-row="${rows.length - 1}"] select`)?.focus();
    } else if (data.removeLora !== undefined) { rows.splice(Number(data.removeLora), 1); show(); changed(false, 0); one("#add-lora").focus(); }
    else if (data.putBack !== undefined) { window.easel.putBack = data.putBack; press("put-back"); follow(); }
    else if (data.forget !== undefined) { await post("preview/forget", { file: data.forget }); press("refresh"); }
    else if (data.compare) { document.documentElement.dataset.compare = data.compare; localStorage.setItem("easel-compare", data.compare); modes(); }
    else if (data.showPreview !== undefined) wanted = true;
    else if (target.id === "draw-grid") setTimeout(follow, 300);
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !one("#generate")?.offsetParent) return;
    event.preventDefault();
    // Typed text is sent when the field loses focus.
    const at = document.activeElement;
    at?.blur();
    at?.focus();
    press("generate");
  });

  const modes = () => { for (const button of all("[data-compare]")) if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", button.dataset.compare === (document.documentElement.dataset.compare || "slider")); };
  document.documentElement.dataset.compare = localStorage.getItem("easel-compare") || "slider";
  window.easel.settling.push(() => {
    read();
    modes();
    const slider = one("input.split"), place = parseFloat(document.documentElement.style.getPropertyValue("--split"));
    if (slider && !Number.isNaN(place) && document.activeElement !== slider) slider.value = place;
    const open = Boolean(one("#generate")?.offsetParent);
    if (open && !wasOpen) opened();
    wasOpen = open;
    if (open && one("#preview-state")?.dataset.busy === "1") follow();
  });
})();
