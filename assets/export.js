// Client of the Export tab: the choice of run and checkpoint, writing, copying and uploading the file, the report.
(() => {
  const { one, post, request, unwrap, toast, make, t, fill } = window.easel;
  const field = (name) => one("#export-form").elements[name];
  const choice = () => ({
    run: one("#export-run")?.value ?? "", checkpoint: one("#checkpoint")?.value ?? "", size: one("#export-size")?.value ?? "",
    ...Object.fromEntries(["name", "format", "precision", "folder"].map((name) => [name, field(name).value])),
    ...Object.fromEntries(new FormData(one("#upload-form"))),
  });
  const problem = (words) => make("p", { className: "problem", textContent: words, attributes: { role: "alert" } });

  const worksIn = () => one("#works-in .panel").parentElement;
  // Results of one file do not apply to the next.
  let unwritten = null, turn = 0, said = "";
  // The foot: the file to come, until one is written or cannot be.
  const showFoot = () => {
    const place = one("#export-will");
    if (!place || !one("#export-form")) return;
    const precision = field("precision").value, { size, half } = place.dataset;
    const file = `${field("name").value.trim().replace(/\.safetensors$/, "") || field("name").placeholder}.safetensors`;
    fill(place, ...(said ? [said] : [make("b", { dir: "auto", textContent: file }), " ", make("span", { className: "small num", textContent: t("about {size}, {precision}", { size: precision === "fp32" ? size : half, precision }) })]));
  };
  const tellFoot = (html) => { said = html; showFoot(); };
  const clear = () => {
    turn += 1;
    tellFoot("");
    one("#export-written").replaceChildren();
    one("#copy-note").replaceChildren();
    one("#upload-note").replaceChildren();
    if (unwritten !== null) worksIn().innerHTML = unwritten;
  };
  // One after the other: the last choice counts.
  const inTurn = window.easel.inTurns();
  const store = (body) => inTurn(() => request("export/choose", body));
  const choose = (body) => { clear(); return store(body); };
  document.addEventListener("change", ({ target }) => {
    if (target.id === "export-run") choose({ run: target.value, checkpoint: "" });
    else if (["checkpoint", "size"].includes(target.name) && target.form?.id === "export-choice") choose({ [target.name]: target.value });
    else if (target.name === "folder" && target.form?.id === "export-form") store({ folder: target.value });
    else if (target.form?.id === "export-form") clear();
  });

  const write = async (button, path, note) => {
    const words = button.textContent, focused = document.activeElement === button, mine = turn;
    Object.assign(button, { disabled: true, textContent: t("Writing…"), title: t("The file is being written.") });
    const reply = await post(path, choice());
    Object.assign(button, { disabled: false, textContent: words, title: "" });
    // A disabled element loses the keyboard focus.
    if (focused && document.activeElement === document.body) button.focus();
    const place = one(note);
    if (mine !== turn) {
      // Another file was chosen meanwhile, and is shown.
      if (unwrap(reply)) toast(t("The file that you asked for before is written."));
      if (reply.link) location.assign(reply.link);
      return;
    }
    if (reply.problem && button.closest(".foot")) return tellFoot(problem(reply.problem).outerHTML);
    if (reply.problem) { place.replaceChildren(problem(reply.problem)); return; }
    place.innerHTML = reply.written ?? reply.copied;
    if (button.closest(".foot")) tellFoot(reply.will ?? "");
    const works = worksIn();
    unwritten ??= works.innerHTML;
    works.innerHTML = reply.works_in;
    if (reply.link) location.assign(reply.link);
  };

  // ---- the report ---------------------------------------------------------------------------------------------------
  // Started from the list of runs, where the Export tab's messages are not visible.
  let quick = false, revision = -1;
  const tell = (state, words) => {
    if (quick && ["done", "error"].includes(state)) toast(words, state === "error" ? "bad" : "");
    const place = one("#report-state"), text = one("#report-words"), button = one("#report-make");
    if (!place) return;
    place.dataset.state = state;
    place.classList.toggle("problem", state === "error");
    if (text.textContent !== words) text.textContent = words;
    one("#report-cancel").hidden = state !== "working";
    if (button?.dataset.reportRun) { button.disabled = state === "working"; button.title = state === "working" ? t("A report is being made.") : ""; }
  };
  window.easel.on("report", (now) => {
    const first = revision === -1;
    const news = now.revision !== revision;
    revision = now.revision;
    if (now.state === "working") tell("working", now.words);
    else if (news) {
      if (now.html && !(first && now.state === "done")) tell(now.state === "error" ? "error" : "done", make("div", { innerHTML: now.html }).textContent);
      else tell("idle", "");
    }
    // A tab that was never open is not in the page; it learns of running work when it opens.
    return Boolean(one("#report-state"));
  });
  const makeReport = async ({ reportRun: run, reportQuick, reportMeasure }) => {
    const measures = reportMeasure !== undefined;
    quick = measures || reportQuick !== undefined;
    if (quick) toast(t("The report of {run} is being made.", { run }));
    tell("working", "");
    const box = one("#report-measure");
    const reply = await inTurn(() => post("report/start", { run, measure: measures || (!quick && box.checked && !box.disabled) }));
    if (reply.problem) tell("error", reply.problem);
  };

  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const data = target.dataset;
    if (target.id === "export-download") write(target, "export/write", "#export-written");
    else if (target.id === "copy-export") write(target, "export/copy", "#copy-note");
    else if (data.copyTo) {
      field("folder").value = data.copyTo;
      store({ folder: data.copyTo });
      write(target, "export/copy", "#copy-note");
    }
    else if (target.id === "upload-export") write(target, "export/upload", "#upload-note");
    else if (data.checkpoint && target.closest("#export-choice")) choose({ checkpoint: data.checkpoint });
    else if (target.id === "report-cancel") inTurn(() => post("report/cancel", {}));
    else if (data.exportRun) choose({ run: data.exportRun, checkpoint: "", size: data.size }).then(() => window.easel.openTab("Export"));
    else if (data.reportRun) makeReport(data);
  });
  document.addEventListener("input", ({ target }) => { if (target.form?.id === "export-form") showFoot(); });
  let usual = "";
  window.easel.settling.push(() => {
    const folders = one("#copy-folders"), run = one("#export-run")?.value ?? "";
    if (!folders || !one("#export-form")) return;
    if (field("name").placeholder !== run) field("name").placeholder = run;
    showFoot();
    // The usual folder, until another one is typed.
    if (folders.dataset.usual !== usual && [usual, ""].includes(field("folder").value)) field("folder").value = folders.dataset.usual;
    usual = folders.dataset.usual;
  });
})();
