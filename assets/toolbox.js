// Client of the Toolbox: files, tool, the tool's fields, progress. Results come as HTML, escaped by the server, and are
// kept by tool.
(() => {
  const { one, all, get, post, refill, make, t, openTab } = window.easel;
  const answers = {};
  const OTHER = "\u0000other", FOLDER = "\u0000folder";
  let offered = { groups: [], runs: [], bases: [] }, tool = "check", rows = [{ file: "", strength: 1 }];

  const option = (words, value, on) => make("option", { textContent: words, value, selected: on });
  const known = (path) => offered.groups.flatMap((group) => group.files).find((file) => file.path === path);
  const button = () => one(`#toolbox [data-tool="${tool}"]`);
  const needs = () => (button()?.dataset.needs || "").split(" ").filter(Boolean);

  // ---- the files ---------------------------------------------------------------------------------------------------
  const fileRow = (row, index) => {
    const listed = known(row.file), typed = row.file && !listed || row.other;
    const select = make("select", { className: "field", data: { part: "file" }, title: row.file, attributes: { "aria-label": t("LoRA file {number}", { number: index + 1 }) } }, option(t("Choose a file"), "", !row.file));
    for (const group of offered.groups) {
      const box = make("optgroup", { label: group.heading });
      for (const file of group.files) box.append(option(file.title, file.path, file.path === row.file && !typed));
      select.append(box);
    }
    select.append(option(t("Another file: type its path"), OTHER, Boolean(typed)));
    const path = make("input", { type: "text", className: "field", value: row.file, hidden: !typed, placeholder: t("Path of a .safetensors file"), spellcheck: false, data: { part: "path" }, attributes: { "aria-label": t("Path of file {number}", { number: index + 1 }) } });
    const strength = make("input", { type: "text", inputMode: "decimal", className: "field", value: row.strength, hidden: !needs().includes("strengths"), data: { part: "strength" }, attributes: { "aria-label": t("Strength of file {number}", { number: index + 1 }), title: t("Strength") } });
    const remove = make("button", { type: "button", className: "own quiet", textContent: t("Remove"), hidden: rows.length < 2, data: { part: "remove" }, attributes: { "aria-label": t("Remove file {number}", { number: index + 1 }) } });
    return make("div", { className: "toolbox-file", data: { index } }, select, strength, remove, path);
  };
  const showFiles = () => { one("#toolbox-files").replaceChildren(...rows.map(fileRow)); };
  // A tool for one file takes the first.
  const most = () => Number(button().dataset.high);
  const chosen = () => rows.slice(0, most() === 1 ? 1 : rows.length).filter((row) => row.file.trim());

  // ---- the fields of the tool -----------------------------------------------------------------------------------------
  const fill = (select, options, value) => {
    select.replaceChildren(...options.map(([words, key]) => option(words, key, key === value)));
    if (value && select.value !== value) select.value = options[0][1];
  };
  const runOf = () => known(chosen()[0]?.file)?.run || "";
  const baseOf = () => offered.runs.find((run) => run.name === runOf())?.base;
  const fillFields = () => {
    const measured = offered.runs.map((run) => [t("what {run} held out", { run: run.name }), run.name]);
    const optional = needs().includes("measure?") ? [[t("nothing, from the files alone"), ""]] : [];
    const measure = one("#toolbox-measure"), kept = measure.dataset.touched ? measure.value : optional.length ? "" : runOf();
    fill(measure, [...optional, ...measured, [t("a folder of images"), FOLDER]], kept);
    const base = one("#toolbox-base"), bases = offered.bases.map((row) => [row.title, row.name]);
    // A base that only a DoRA needs stays empty until one is chosen for this tool.
    const free = needs().includes("base?"), none = free ? [[t("none: only a DoRA needs it"), ""]] : [];
    const given = free ? base.dataset.touched === tool : base.dataset.touched;
    fill(base, [...none, ...bases, [t("another, by its path"), OTHER]], given ? base.value : free ? "" : baseOf() || bases[0]?.[1]);
  };
  const show = () => {
    const wanted = new Set(needs().map((need) => need.replace("?", "")));
    if (wanted.has("measure") && one("#toolbox-measure").value === FOLDER) wanted.add("dataset").add("base");
    if (wanted.has("base") && one("#toolbox-base").value === OTHER) wanted.add("other-base");
    if (wanted.has("size")) wanted.add("by").add(one("#toolbox-by").value === "energy" ? "energy" : "rank");
    for (const each of all("#toolbox [data-field]")) each.hidden = !wanted.has(each.dataset.field);
    one("#toolbox-rank").placeholder = needs().includes("rank?") ? t("empty: exact, ranks add") : "";
    for (const each of all("#toolbox [data-tool]")) each.setAttribute("aria-pressed", String(each === button()));
    for (const each of all("#toolbox-files [data-part=strength]")) each.hidden = !wanted.has("strengths");
    all("#toolbox-files .toolbox-file").forEach((each, index) => { each.hidden = most() < 2 && index >= most(); });
    one("#toolbox-add").hidden = most() < 2;
    one("#toolbox-go").textContent = button().dataset.go;
    why();
  };
  const showAnswer = () => {
    const place = one("#toolbox-answer");
    if (answers[tool]) place.innerHTML = answers[tool];
    else place.replaceChildren(one("#toolbox-empty").content.cloneNode(true));
    window.charts.settle();
  };
  const why = () => {
    const low = Number(button().dataset.low), high = Number(button().dataset.high), count = chosen().length;
    const few = low === 1 ? t("Choose a file first.") : low === high ? t("Two files are needed: add another.") : t("Two files or more are needed: add another.");
    const text = count < low ? few : high > 1 && count > high ? t("At most {count} files: remove the others.", { count: high }) : "";
    const go = one("#toolbox-go"), working = one("#toolbox-state").dataset.state === "working";
    go.disabled = Boolean(text) || working;
    go.title = working ? t("A tool is running.") : text;
    one("#toolbox-why").textContent = working ? "" : text;
  };
  const choose = (name) => {
    tool = name;
    showAnswer();
    if (needs().includes("rank?")) one("#toolbox-rank").value = "";
    else if (!one("#toolbox-rank").value) one("#toolbox-rank").value = "8";
    fillFields();
    show();
  };

  // ---- requests -----------------------------------------------------------------------------------------------------
  const base = () => { const value = one("#toolbox-base").value; return value === OTHER ? one("#toolbox-other-base").value : value; };
  const measure = () => {
    const value = one("#toolbox-measure").value;
    if (!needs().some((need) => need.startsWith("measure")) || value === "") return null;
    return value === FOLDER ? { dataset: one("#toolbox-dataset").value, base: base() } : { run: value };
  };
  const start = async () => {
    const value = (id) => one(`#toolbox-${id}`).value;
    const files = button().dataset.high === "0" ? [] : chosen().map(({ file, strength }) => ({ file, strength }));
    await begin("toolbox/start", { tool, files, base: needs().some((need) => need.startsWith("base")) ? base() : "", tuned: value("tuned"), measure: measure(), by: value("by"), rank: value("rank"), energy: value("energy"), apart: one("#toolbox-apart").checked, blocks: value("blocks"), format: value("format"), alphas: one("#toolbox-alphas").checked });
  };
  const begin = async (path, body) => {
    tell("working", "");
    picked = false;
    const { problem } = await inTurn(() => post(path, body));
    if (problem) tell("error", problem);
  };
  // The last click arrives last: a cancel that overtakes the start would cancel nothing.
  const inTurn = window.easel.inTurns();
  const tell = (state, words) => {
    const place = one("#toolbox-state");
    place.dataset.state = state;
    place.classList.toggle("problem", state === "error");
    if (place.textContent !== words) place.textContent = words;
    one("#toolbox-cancel").hidden = state !== "working";
    why();
  };

  // ---- progress ------------------------------------------------------------------------------------------------------
  let revision = -1, picked = false;
  window.easel.on("toolbox", (now) => {
    if (!one("#toolbox")) return false;
    const working = now.state === "working", track = one("#toolbox-track");
    tell(working ? "working" : "idle", now.words);
    track.hidden = !working;
    // Without a total the bar only moves.
    track.classList.toggle("preparing", !now.total);
    track.firstElementChild.style.width = now.total ? `${(100 * now.done) / now.total}%` : "100%";
    if (working || now.revision === revision) return;
    revision = now.revision;
    if (!now.html) return;
    answers[now.name] = now.html;
    // A choice made while the answer was on its way counts more.
    if (now.name !== tool && !picked) choose(now.name); else showAnswer();
    load();
  });

  // ---- events ------------------------------------------------------------------------------------------------------------
  const load = async () => {
    offered = await get("toolbox/choices");
    if (!rows.some((row) => row.file) && offered.groups[0]?.files[0]) rows[0].file = offered.groups[0].files[0].path;
    // Not while the user is typing there.
    if (!one("#toolbox-files").contains(document.activeElement)) showFiles();
    fillFields();
    show();
    if (!one("#toolbox-answer").firstChild) showAnswer();
  };
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if (data.tool && target.closest("#toolbox")) { picked = true; choose(data.tool); }
    else if (target.id === "toolbox-add") { rows.push({ file: "", strength: 1 }); showFiles(); why(); }
    else if (data.part === "remove" && target.closest("#toolbox")) { rows.splice(Number(target.parentElement.dataset.index), 1); showFiles(); fillFields(); show(); one("#toolbox-add").focus(); }
    else if (target.id === "toolbox-cancel") inTurn(() => post("toolbox/cancel", {}));
    else if (data.toolboxAct) begin("toolbox/act", { do: data.toolboxAct });
    else if (data.toolboxGoOn) post("toolbox/go-on", { file: data.toolboxGoOn }).then((reply) => {
      if (reply.problem) return tell("error", reply.problem);
      refill();
      openTab("Train");
    });
    else if (data.toolboxFile) inspect(data.toolboxFile);
  });
  // A tab that was never open is not in the page: its file waits until it is.
  let pending = null;
  const inspect = (file) => { pending = file; openTab("Toolbox"); if (seen) inspectPending(); };
  const inspectPending = async () => {
    if (!pending) return;
    rows = [{ file: pending, strength: 1 }];
    pending = null;
    showFiles();
    choose("check");
    await load();
    start();
  };
  window.easel.openLora = async (file) => {
    if (seen) tell("working", t("{name} is being read", { name: file.name }));
    const reply = await window.easel.upload("toolbox/file", file);
    if (!reply.problem) return inspect(reply.file);
    if (seen) tell("error", reply.problem); else window.easel.toast(reply.problem, "bad");
  };
  document.addEventListener("change", ({ target }) => {
    if (target.id !== "toolbox-upload" || !target.files.length) return;
    window.easel.openLora(target.files[0]);
    target.value = "";
  });
  document.addEventListener("submit", (event) => {
    if (event.target.id !== "toolbox-form") return;
    event.preventDefault();
    if (!one("#toolbox-go").disabled) start();
  });
  document.addEventListener("input", (event) => {
    const row = event.target.closest(".toolbox-file"), part = event.target.dataset.part;
    if (row) {
      const kept = rows[Number(row.dataset.index)];
      if (part === "strength") kept.strength = event.target.value;
      else if (part === "path") kept.file = event.target.value;
      else if (part === "file") {
        kept.other = event.target.value === OTHER;
        kept.file = kept.other ? "" : event.target.value;
        one("[data-part=path]", row).hidden = !kept.other;
        if (kept.other) one("[data-part=path]", row).focus();
      }
      fillFields();
      show();
    } else if (event.target.closest("#toolbox-form")) {
      event.target.dataset.touched = tool;
      show();
    }
  });
  // When the card appears and whenever its tab opens: runs and files change.
  let seen = null;
  window.easel.settling.push(() => {
    const card = one("#toolbox"), open = card?.offsetParent;
    if (!open) { seen = null; return; }
    if (seen === card) return;
    seen = card;
    load().then(inspectPending);
  });
})();
