// Reads a JSON array of TraceQL queries on standard input; writes, for each, where it is not TraceQL (an empty array: nowhere).
import { readFileSync } from "node:fs";
import { parser } from "@grafana/lezer-traceql";

const faults = JSON.parse(readFileSync(0, "utf8")).map((query) => {
  const found = [];
  parser.parse(query).iterate({
    enter: (node) => {
      if (node.type.isError) found.push(node.from);
    },
  });
  return found;
});
process.stdout.write(JSON.stringify(faults));
