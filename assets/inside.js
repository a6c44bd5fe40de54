// Client of "Look inside any LoRA" and of the report: files, tool, the tool's fields, progress. Results come as HTML,
// escaped by the server.
(() => {
  const { one, all, get, post, press, make, openTab } = window.easel;
  const OTHER = "\u0000other", FOLDER = "\u0000folder";
  let offered = { groups: [], runs: [], bases: [] }, tool = "spectrum", rows = [{ file: "", strength: 1 }];

  const option = (words, value, on) => make("option", { textContent: words, value, selected: on });
  const known = (path) => offered.groups.flatMap((group) => group.files).find((file) => file.path === path);
  const button = () => one(`#inside [data-tool="${tool}"]`);
  const needs = () => (button()?.dataset.needs || "").split(" ").filter(Boolean);

  // ---- the files ---------------------------------------------------------------------------------------------------
  const fileRow = (row, index) => {
    const listed = known(row.file), typed = row.file && !listed || row.other;
    const select = make("select", { className: "field", data: { part: "file" }, attributes: { "aria-label": `LoRA file ${index + 1}` } }, option("Choose a file", "", !row.file));
    for (const group of offered.groups) {
      const box = make("optgroup", { label: group.heading });
      for (const file of group.files) box.append(option(file.title, file.path, file.path === row.file && !typed));
      select.append(box);
    }
    select.append(option("Another file, by its path", OTHER, Boolean(typed)));
    const path = make("input", { type: "text", className: "field", value: row.file, hidden: !typed, placeholder: "Path of a .safetensors file", spellcheck: false, data: { part: "path" }, attributes: { "aria-label": `Path of file ${index + 1}` } });
    const strength = make("input", { type: "text", inputMode: "decimal", className: "field", value: row.strength, hidden: !needs().includes("strengths"), data: { part: "strength" }, attributes: { "aria-label": `Strength of file ${index + 1}`, title: "Strength" } });
    const remove = make("button", { type: "button", className: "own quiet", textContent: "Remove", hidden: rows.length < 2, data: { part: "remove" }, attributes: { "aria-label": `Remove file ${index + 1}` } });
    return make("div", { className: "inside-file", data: { index } }, select, strength, remove, path);
  };
  const showFiles = () => { one("#inside-files").replaceChildren(...rows.map(fileRow)); };
  const chosen = () => rows.filter((row) => row.file.trim());

  // ---- the fields of the tool -----------------------------------------------------------------------------------------
  const fill = (select, options, value) => {
    select.replaceChildren(...options.map(([words, key]) => option(words, key, key === value)));
    if (value && select.value !== value) select.value = options[0][1];
  };
  const runOf = () => known(chosen()[0]?.file)?.run || "";
  const baseOf = () => offered.runs.find((run) => run.name === runOf())?.base;
  const fillFields = () => {
    const measured = offered.runs.map((run) => [`what ${run.name} held out`, run.name]);
    const optional = needs().includes("measure?") ? [["nothing, from the files alone", ""]] : [];
    const measure = one("#inside-measure"), kept = measure.dataset.touched ? measure.value : optional.length ? "" : runOf();
    fill(measure, [...optional, ...measured, ["a folder of pictures", FOLDER]], kept);
    const base = one("#inside-base"), bases = offered.bases.map((row) => [row.title, row.name]);
    // A base that only a DoRA needs stays empty until one is chosen for this tool.
    const free = needs().includes("base?"), none = free ? [["none: only a DoRA needs it", ""]] : [];
    const given = free ? base.dataset.touched === tool : base.dataset.touched;
    fill(base, [...none, ...bases, ["another, by its path", OTHER]], given ? base.value : free ? "" : baseOf() || bases[0]?.[1]);
  };
  const field = (name, on) => { one(`#inside [data-field="${name}"]`).hidden = !on; };
  const show = () => {
    const wanted = needs(), measuring = wanted.some((need) => need.startsWith("measure")), folder = measuring && one("#inside-measure").value === FOLDER;
    const base = wanted.includes("base") || wanted.includes("base?") || folder, energy = wanted.includes("size") && one("#inside-by").value === "energy";
    field("tuned", wanted.includes("tuned"));
    field("measure", measuring);
    field("dataset", folder);
    field("base", base);
    field("other-base", base && one("#inside-base").value === OTHER);
    field("by", wanted.includes("size"));
    field("rank", (wanted.includes("size") && !energy) || wanted.includes("rank") || wanted.includes("rank?"));
    field("blocks", wanted.includes("blocks?"));
    field("format", wanted.includes("format"));
    field("alphas", wanted.includes("alphas"));
    field("energy", energy);
    field("apart", wanted.includes("apart"));
    one("#inside-rank").placeholder = wanted.includes("rank?") ? "empty: exact, ranks add" : "";
    for (const each of all("#inside [data-tool]")) each.setAttribute("aria-pressed", String(each === button()));
    for (const each of all("#inside-files [data-part=strength]")) each.hidden = !wanted.includes("strengths");
    one("#inside-go").textContent = button().dataset.go;
    why();
  };
  const why = () => {
    const low = Number(button().dataset.low), high = Number(button().dataset.high), count = chosen().length;
    const few = low === 1 ? "Choose a file first." : `${low === high ? "Two files are needed" : "Two files or more are needed"}: add another.`;
    const text = count < low ? few : high && count > high ? (high === 1 ? "This looks at one file: remove the others." : "Two files are compared: remove the others.") : "";
    const go = one("#inside-go"), working = one("#inside-state").dataset.state === "working";
    go.disabled = Boolean(text) || working;
    go.title = working ? "One look is under way." : text;
    one("#inside-why").textContent = working ? "" : text;
  };
  const choose = (name) => {
    tool = name;
    if (needs().includes("rank?")) one("#inside-rank").value = "";
    else if (!one("#inside-rank").value) one("#inside-rank").value = "8";
    fillFields();
    show();
  };

  // ---- requests -----------------------------------------------------------------------------------------------------
  const base = () => { const value = one("#inside-base").value; return value === OTHER ? one("#inside-other-base").value : value; };
  const measure = () => {
    const value = one("#inside-measure").value;
    if (!needs().some((need) => need.startsWith("measure")) || value === "") return null;
    return value === FOLDER ? { dataset: one("#inside-dataset").value, base: base() } : { run: value };
  };
  const start = async () => {
    const value = (id) => one(`#inside-${id}`).value;
    const files = button().dataset.high === "0" ? [] : chosen().map(({ file, strength }) => ({ file, strength }));
    await begin("inside", "inside/start", { tool, files, base: needs().some((need) => need.startsWith("base")) ? base() : "", tuned: value("tuned"), measure: measure(), by: value("by"), rank: value("rank"), energy: value("energy"), apart: one("#inside-apart").checked, blocks: value("blocks"), format: value("format"), alphas: one("#inside-alphas").checked });
  };
  const begin = async (job, path, body) => {
    tell(job, "working", "");
    const said = await post(path, body).catch(() => ({ problem: "The window does not answer; is it still open?" }));
    if (said.problem) tell(job, "error", said.problem);
    else follow(job);
  };
  // Started from the list of runs, where the Export tab's messages are not visible.
  let quick = false;
  const makeReport = ({ reportRun: run, reportQuick }) => {
    quick = reportQuick !== undefined;
    if (quick) window.easel.toast(`The report of ${run} is being made.`);
    // Only a page that knows an earlier result is told about a new one.
    if (revisions.report === -1) revisions.report = 0;
    begin("report", "report/start", { run, measure: !quick && one("#report-measure").checked });
  };
  const tell = (job, state, words) => {
    if (job === "report" && quick && ["done", "error"].includes(state)) window.easel.toast(words, state === "error" ? "bad" : "");
    const place = one(`#${job}-state`);
    if (!place) return;
    place.dataset.state = state;
    place.classList.toggle("problem", state === "error");
    const text = job === "report" ? one("#report-words") : place;
    if (text.textContent !== words) text.textContent = words;
    if (job === "report") {
      one("#report-cancel").hidden = state !== "working";
      const make = one("#report-make");
      if (make?.dataset.reportRun) { make.disabled = state === "working"; make.title = state === "working" ? "A report is being made." : ""; }
    } else {
      one("#inside-cancel").hidden = state !== "working";
      why();
    }
  };

  // ---- progress ------------------------------------------------------------------------------------------------------
  const revisions = { inside: -1, report: -1 };
  const lookAt = (job) => async () => {
    const now = await get(`${job}/now?known=${revisions[job]}`);
    const working = now.state === "working";
    tell(job, working ? "working" : "idle", now.words);
    if (job === "inside") {
      one("#inside-track").hidden = !working;
      one("#inside-track > i").style.width = now.total ? `${(100 * now.done) / now.total}%` : "0";
    }
    if (now.html !== undefined && !working) finished(job, now);
    return working;
  };
  const followers = Object.fromEntries(Object.keys(revisions).map((job) => [job, window.easel.follower(lookAt(job), 300)]));
  const follow = (job) => followers[job]().catch(() => tell(job, "error", "The window does not answer; is it still open?"));
  const finished = (job, now) => {
    const first = revisions[job] === -1;
    revisions[job] = now.revision;
    if (!now.html) return;
    if (job === "report") {
      if (first && now.state === "done") return;
      const box = make("div", { innerHTML: now.html });
      tell(job, now.state === "error" ? "error" : "done", box.textContent);
      press("refresh");
    } else {
      one("#inside-answer").innerHTML = now.html;
      load();
    }
  };

  // ---- events ------------------------------------------------------------------------------------------------------------
  const load = async () => {
    offered = await get("inside/choices");
    if (!rows.some((row) => row.file) && offered.groups[0]?.files[0]) rows[0].file = offered.groups[0].files[0].path;
    // Not while the user is typing there.
    if (!one("#inside-files").contains(document.activeElement)) showFiles();
    fillFields();
    show();
  };
  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if (data.tool && target.closest("#inside")) choose(data.tool);
    else if (target.id === "inside-add") { rows.push({ file: "", strength: 1 }); showFiles(); why(); }
    else if (data.part === "remove" && target.closest("#inside")) { rows.splice(Number(target.parentElement.dataset.index), 1); showFiles(); fillFields(); show(); }
    else if (target.id === "inside-cancel") post("inside/cancel", {});
    else if (target.id === "report-cancel") post("report/cancel", {});
    else if (data.insideAct) begin("inside", "inside/act", { do: data.insideAct });
    else if (data.insideGoOn) post("inside/go-on", { file: data.insideGoOn }).then((said) => {
      if (said.problem) return tell("inside", "error", said.problem);
      press("refill");
      openTab("Train");
    });
    else if (data.insideFile) {
      rows = [{ file: data.insideFile, strength: 1 }];
      showFiles();
      choose("spectrum");
      one("#inside").scrollIntoView();
      start();
    } else if (data.reportRun) makeReport(data);
  });
  document.addEventListener("submit", (event) => {
    if (event.target.id !== "inside-form") return;
    event.preventDefault();
    if (!one("#inside-go").disabled) start();
  });
  document.addEventListener("input", (event) => {
    const row = event.target.closest(".inside-file"), part = event.target.dataset.part;
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
    } else if (event.target.closest("#inside-form")) {
      event.target.dataset.touched = tool;
      show();
    }
  });
  // When the card appears and whenever its tab opens: runs and files change.
  let seen = null;
  window.easel.settling.push(() => {
    const card = one("#inside"), open = card?.offsetParent;
    if (!open) { seen = null; return; }
    if (seen === card) return;
    seen = card;
    load().then(() => { follow("inside"); follow("report"); });
  });
})();
