// Dropping anywhere on the window, folders with sub-folders included.
//
// A browser's file input cannot take a dropped folder. So drops are caught first, folders are walked, and each file is
// handed on with the path that it had, so that `10_name` folders are not lost.
(() => {
  const MOST_FILES = 20000;
  const holdsFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");

  const allEntries = (folder) => new Promise((resolve, reject) => {
    const reader = folder.createReader(), found = [];
    // One call gives at most 100 entries; an empty answer is the end.
    const more = () => reader.readEntries((part) => {
      if (!part.length) return resolve(found);
      found.push(...part);
      more();
    }, reject);
    more();
  });

  const walk = async (entry, prefix, files) => {
    if (files.length > MOST_FILES || entry.name.startsWith(".")) return;
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      files.push({ file, path: prefix + file.name });
    } else if (entry.isDirectory) {
      for (const inside of await allEntries(entry)) await walk(inside, `${prefix}${entry.name}/`, files);
    }
  };

  const dropped = async (transfer) => {
    const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
    const files = [];
    // A single dropped folder is the dataset itself: its own name says nothing of the pictures in it.
    for (const entry of entries) {
      const alone = entries.length === 1 && entry.isDirectory && !/^\d+_/.test(entry.name);
      if (alone) for (const inside of await allEntries(entry)) await walk(inside, "", files);
      else await walk(entry, "", files);
    }
    return files;
  };

  // An adapter file is no picture: it goes to the panel that says what it is, where that is in the page. On the
  // Preview tab it is to be used there, and of a picture the settings are wanted.
  const previewDrop = () => { const place = document.querySelector("#preview-drop"); return place?.offsetParent ? place : null; };
  const hand = (files) => {
    const name = files.length === 1 ? files[0].path : "", adapter = /\.safetensors$/i.test(name);
    const preview = (adapter || /\.png$/i.test(name)) && previewDrop();
    const place = preview || (adapter && document.querySelector("#check-drop"));
    const input = place && place.querySelector("input[type=file]");
    if (!input) return window.easel.takeFiles(files);
    const transfer = new DataTransfer();
    transfer.items.add(files[0].file);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    if (!preview) window.easel.openTab("Export");
  };

  let depth = 0;
  const mark = (on) => {
    document.documentElement.classList.toggle("dropping", on);
    document.documentElement.dataset.drop = previewDrop() ? "preview" : "";
  };
  addEventListener("dragenter", (event) => { if (holdsFiles(event)) { depth += 1; mark(true); } }, true);
  addEventListener("dragleave", (event) => { if (holdsFiles(event)) { depth = Math.max(0, depth - 1); mark(depth > 0); } }, true);
  addEventListener("dragover", (event) => { if (holdsFiles(event)) { event.preventDefault(); event.stopPropagation(); } }, true);
  addEventListener("drop", async (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    event.stopPropagation();
    depth = 0;
    mark(false);
    hand(await dropped(event.dataTransfer));
  }, true);
})();
